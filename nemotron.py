#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The nemotron.py authors
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Talk to Nemotron-4-340B-Instruct, or any OpenAI-compatible chat endpoint.

    $ python3 nemotron.py 'Name two techniques to cook lamb.'
    >>> nemotron.chat("Name two techniques to cook lamb.").text

A reply is complete, or it is an error.  Only the standard library is used.
"""

from __future__ import annotations

import collections
import contextlib
import email.utils
import errno
import functools
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import reprlib
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.request

TYPE_CHECKING = False  # importing typing takes 2 ms, and only type checkers need it
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from typing import Any, TypedDict, TypeVar, Union

    from typing_extensions import Unpack

    JSON = dict[str, Any]
    Messages = Union[str, Sequence[JSON]]
    T = TypeVar("T")

    class Params(TypedDict, total=False):
        model: str | None
        system: str | None
        extra: JSON | None
        temperature: float | None
        top_p: float | None
        min_p: float | None
        top_k: int | None
        max_tokens: int | None
        presence_penalty: float | None
        frequency_penalty: float | None
        repetition_penalty: float | None
        tool_choice: str | None
        user: str | None
        seed: int | None
        stop: str | list[str] | None
        n: int | None
        tools: list[JSON] | None
        response_format: JSON | None


__version__ = "2.0.0"
__all__ = ["MODEL", "BASE_URL", "chat", "stream", "batch", "build_request", "Client"]
__all__ += ["Completion", "Chunk", "Stream", "offline", "main", "NemotronError"]
__all__ += ["InvalidRequestError", "APIConnectionError", "APITimeoutError"]
__all__ += ["APIStatusError", "AuthenticationError", "RateLimitError", "ReplyError"]
__all__ += ["IncompleteReplyError"]

MODEL = "nvidia/Nemotron-4-340B-Instruct"
BASE_URL = "https://api.deepinfra.com/v1/openai"
MAX_BYTES = 64 << 20  # of a reply, or of one server-sent event
MAX_DELAY = 120.0  # seconds; where the server asks for more, there is no retry
GRACE = 5.0  # seconds to go on reading after the end of a streamed reply

# ---------------------------------------------------------------------------- Errors

CONTROLS = "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
MAX_MESSAGE = 280  # characters; with the prefix of the command line under 300


def escape_controls(text: str) -> str:
    r"""Show control characters and direction overrides as escapes like \x1b."""
    return re.sub(CONTROLS, lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    line = escape_controls(" ".join(text[: 4 * MAX_MESSAGE].split()))
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."


def describe(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class NemotronError(Exception):
    """Base class of the errors; str() of one is a line of at most 280 characters."""

    code = "error"  # in the rows of a batch
    exit_status = 1  # of the command line
    retryable = False  # whether the same request may succeed later
    status_code: int | None = None
    body: Any = None  # of the response: JSON, or text
    request_id: str | None = None
    retry_after: float | None = None  # seconds
    partial: Completion  # what was received

    def __init_subclass__(cls, code: str = "", status: int = 0) -> None:
        cls.code, cls.exit_status = code or cls.code, status or cls.exit_status

    def __str__(self) -> str:
        return one_line(super().__str__())


class InvalidRequestError(NemotronError, ValueError, code="invalid_request", status=2):
    """The caller's mistake; nothing was sent."""


class APIConnectionError(NemotronError, code="connection"):
    """There is no usable connection to the server."""


class APITimeoutError(APIConnectionError, TimeoutError, code="timeout"):
    """`timeout` or `deadline` has passed (in a stream: before its status 200)."""


class APIStatusError(NemotronError, code="api_status"):
    """The server answered with a status other than 200."""


class AuthenticationError(APIStatusError, code="authentication", status=4):
    """Status 401, 402 or 403; or no usable token, and status_code is None."""


class RateLimitError(APIStatusError, code="rate_limit", status=5):
    """Status 429 or 503: the server is busy."""


class ReplyError(NemotronError, code="reply"):
    """Status 200, but not an answer; partial is the Completion received so far."""


class IncompleteReplyError(ReplyError, code="incomplete_reply", status=3):
    """The stream stopped before the reply ended; partial is what was received."""


# ------------------------------------------------------------------------ Parameters


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "a number": lambda x: isinstance(x, (int, float)),
    "an integer": lambda x: isinstance(x, int),
    "a string": lambda x: isinstance(x, str),
    "a path": lambda x: isinstance(x, (str, os.PathLike)),
    "none or auto": lambda x: x in ("none", "auto"),
    "a string or a list of 1 to 16": lambda x: (
        isinstance(x, str) or is_list_of(str, x) and 1 <= len(x) <= 16
    ),
    "a list of objects": lambda x: is_list_of(dict, x),
    "an object": lambda x: isinstance(x, dict),
}


def read_table(text: str) -> list[list[str]]:
    """Return the rows of a table, one a line, whose cells are separated by "|"."""
    return [[cell.strip() for cell in row.split("|")] for row in text.splitlines()]


# From the provider's page of the model, and its OpenAPI file.
# name | kind | limits | server's default | help
PARAMETERS = read_table("""\
temperature | a number | 0 <= x <= 2 | 1 | lower is more focused
top_p | a number | 0 < x <= 1 | 1 | probability to sample from
min_p | a number | 0 <= x <= 1 | 0 | relative to the likeliest
top_k | an integer | 0 <= x <= 999 | 0 | how many to choose from
max_tokens | an integer | 0 <= x <= 1000000 | | most tokens to generate
presence_penalty | a number | -2 <= x <= 2 | 0 | above 0: more new topics
frequency_penalty | a number | -2 <= x <= 2 | 0 | above 0: less repetition
repetition_penalty | a number | 0.01 <= x <= 5 | 1 | above 1: less repetition
tool_choice | none or auto | | | whether it may call a tool
user | a string | | | hashed ID of your end user
seed | an integer | 0 <= x <= 9223372036854775807 | | to repeat a reply
stop | a string or a list of 1 to 16 | | | end the reply before this text
n | an integer | 1 <= x <= 4 | 1 | number of replies
tools | a list of objects | | | functions that it may call
response_format | an object | | | such as {"type": "json_object"}""")
# Other names | kind | limits | what they are
SETTINGS = read_table("""\
model system | a string | |
extra | an object | |
base_url token | a string | | belongs to Client()
timeout deadline | a number | 0 < x <= 1000000 | belongs to Client()
retries | an integer | 0 <= x <= 1000 | belongs to Client()
jobs | an integer | 1 <= x <= 200 | belongs to batch()
output | a path | | belongs to batch()
max_cost | a number | 0 <= x <= 1000000 | belongs to the command line
stream | | | is chosen by calling stream()""")
SPECS = {name: row for row in PARAMETERS + SETTINGS for name in row[0].split()}
REQUEST_NAMES = [row[0] for row in PARAMETERS] + ["model", "system", "extra"]


def check_value(name: str, value: Any) -> None:
    """Raise InvalidRequestError unless a value fits its row of the tables."""
    kind, limits = SPECS[name][1:3]
    valid = KINDS[kind](value) and not isinstance(value, bool)
    if valid and limits:
        low, sign, _, _, high = limits.split()
        valid = float(low) <= value <= int(high)
        valid = valid and (sign == "<=" or value > float(low))
    if not valid:
        expected, got = f"{kind}, {limits}".rstrip(", "), reprlib.repr(value)
        raise InvalidRequestError(f"{name} must be {expected}; got {got}")


def check_parameters(values: Any) -> JSON:
    """Return the values that are not None.  Raises InvalidRequestError."""
    for name in [name for name in values if name not in REQUEST_NAMES]:
        import difflib

        near = difflib.get_close_matches(name, REQUEST_NAMES, 1, 0.0)[0]
        advice = f"unknown, did you mean {near}? (undocumented fields go into extra)"
        raise InvalidRequestError(f"{name:.80}: {SPECS.get(name, [advice])[-1]}")
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        check_value(name, value)
    return given


# --------------------------------------------------------------------------- Request


def dig(default: T, value: Any, *path: Any) -> T:
    """Return value[path[0]]..., or default if it is missing or of another type."""
    try:
        for key in path:
            value = value[key]
    except (LookupError, TypeError):
        return default
    return value if default is None or isinstance(value, type(default)) else default


raw_decode = json.JSONDecoder().raw_decode


def read_json(text: str) -> Any:
    """Return the value of a JSON text, or the text itself if it is not JSON."""
    stripped = text.strip()
    try:
        value, end = raw_decode(stripped)  # faster than json.loads()
    except (ValueError, RecursionError):
        return text
    return value if end == len(stripped) else text


def to_json(value: object) -> str:
    """Return the value as JSON on one line, in ASCII.  Raises InvalidRequestError."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"not JSON: {error}") from None


def check_messages(messages: Any) -> list[JSON]:
    """Return copies of the messages.  Raises InvalidRequestError, which names one."""
    if not isinstance(messages, (list, tuple)):
        raise InvalidRequestError(f"messages: not a list: {reprlib.repr(messages)}")
    for index, message in enumerate(messages):
        role, content = dig("", message, "role"), dig(None, message, "content")
        has_content = isinstance(content, str) or content and is_list_of(dict, content)
        has_calls = role == "assistant" and dig(None, message, "tool_calls")
        problem = ""
        if role not in ("system", "user", "assistant", "tool"):
            problem = "role must be system, user, assistant or tool"
        elif not has_content and not (has_calls and content is None):
            problem = "content must be a string or a list of objects"
        elif role == "tool" and not dig("", message, "tool_call_id"):
            problem = "a tool message must have a tool_call_id"
        if problem:
            raise InvalidRequestError(f"messages[{index}]: {problem}")
    return [dict(message) for message in messages]


def build_request(
    messages: Messages, *, stream: bool = False, **params: Unpack[Params]
) -> JSON:
    """Return the JSON body of a request.  Raises InvalidRequestError.

    messages  a string, which is one user message, or a list of message objects
    model     MODEL if it is not given
    system    the text of a system message to put in front of them
    params    the names in PARAMETERS; what is not given is not in the body
    extra     other fields, which go into the body last and are not checked
    """
    given = check_parameters(params)
    fields, system = given.pop("extra", {}), given.pop("system", None)
    if {"messages", "model", "stream"} & fields.keys():
        raise InvalidRequestError("extra must be without messages, model and stream")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    checked = check_messages(messages)
    systems = [i for i, m in enumerate(checked) if m["role"] == "system"]
    turns = [i for i, m in enumerate(checked) if m["role"] != "system"]
    last = max(turns, default=0)
    if dig("", checked, last, "role") not in ("user", "tool"):
        raise InvalidRequestError(f"messages[{last}]: last role must be user or tool")
    if len(systems) + (system is not None) > 1:
        raise InvalidRequestError(f"messages[{systems[-1]}]: a second system message")
    if system is not None:
        checked.insert(0, {"role": "system", "content": system})
    body = {"model": MODEL, "messages": checked, **given, **fields}
    return {**body, "stream": True} if stream else body


# ----------------------------------------------------------------------------- Reply

STOP_TOKEN = "</s>"  # the model's own; the provider sends it as the last piece of text
INCOMPLETE = ("length", "content_filter", "abort", "error")  # values of finish_reason
RUNNING_TEXT = ("content", "reasoning_content", "reasoning", "refusal", "arguments")
MAX_DEPTH = 100  # levels of nesting in a chunk
MERGED = (dict, list, io.StringIO)  # types that no value of another type replaces


class Completion(dict[str, "Any"]):
    """The server's JSON, untouched.  The properties describe choice 0; none raises."""

    def _dig(self, default: T, *path: Any) -> T:
        choices: list[Any] = dig([], self, "choices")
        first = next((c for c in choices if not dig(None, c, "index")), None)
        return dig(default, first, *path)

    @property
    def text(self) -> str:
        """The text; "" if there is none."""
        return self._dig("", "message", "content") or self._dig("", "delta", "content")

    @property
    def finish_reason(self) -> str | None:
        """Such as "stop", "length" or "tool_calls"; None if not finished."""
        return self._dig("", "finish_reason") or None

    @property
    def usage(self) -> JSON:
        """prompt_tokens, completion_tokens, total_tokens ...; {} if there is none."""
        return dig({}, self, "usage")

    @property
    def cost(self) -> float | None:
        """US dollars: `usage.estimated_cost`, else `usage.cost`; None if unknown."""
        costs: list[Any] = [self.usage.get(name) for name in ("estimated_cost", "cost")]
        known = (c for c in costs if type(c) in (int, float) and abs(c) < 1e9)
        return next(known, None)

    @property
    def tool_calls(self) -> list[JSON]:
        """The tool calls; [] if there are none."""
        calls: list[JSON] = self._dig([], "message", "tool_calls")
        return calls if is_list_of(dict, calls) else []

    @property
    def message(self) -> JSON:
        """The reply as an assistant message, for the messages of the next request."""
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}


class Chunk(Completion):
    """One `chat.completion.chunk` of a stream."""


def server_message(answer: Any) -> str:
    """Return what the server says went wrong, in its own words; "" if nothing."""
    while isinstance(answer, (dict, list)):
        values: Any = answer
        if isinstance(answer, dict):
            names = ("error", "detail", "error_message", "message", "msg")
            values = map(answer.get, names)
        answer = next((v for v in values if v and isinstance(v, (str, dict, list))), "")
    is_text = isinstance(answer, str) and not answer.lstrip().startswith("<")
    return answer if is_text else ""  # not a page of HTML


class ChunkMerger:
    """Merges the chunks of a stream into one Completion."""

    def __init__(self) -> None:
        self.choices: dict[Any, JSON] = {}  # by index
        self.is_finished = False  # whether every choice that came has a finish_reason
        self._reply: JSON = {}  # without the choices
        self._texts: list[Any] = []  # (object, key, io.StringIO) of all running text
        self._items: dict[Any, JSON] = {}  # by the id of their list and their index
        self._stop_tokens: dict[Any, str] = {}  # by choice; it is text if more follows
        self._plain: Any = None  # the last chunk, if others may differ in text only

    def add(self, chunk: Any, source: str) -> str:
        """Merge a chunk, or a whole reply; return the text that it adds to choice 0.

        Raises ReplyError for an error of the server, and for what is no chunk.
        """
        try:
            # Most chunks differ from the last in their text only: this is fast.
            choices = chunk.get("choices") or [{}]
            text: Any = (choices[0].get("delta") or {}).get("content")
            if self._plain and text not in (None, "", STOP_TOKEN):
                self._plain["choices"][0]["delta"]["content"] = text
                if chunk == self._plain:
                    self.choices[0]["message"]["content"].write(text)
                    return str(text)
            return self._add(chunk)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
            message = server_message(source)
        raise ReplyError(f"the server sent an odd chunk: {message}")

    def _add(self, chunk: JSON) -> str:
        choices = chunk.get("choices") or []
        failed = next((part for part in (chunk, *choices) if part.get("error")), chunk)
        message = server_message(failed)
        if failed.get("error") or (message and not choices):
            raise ReplyError(f"the server sent an error, or no reply: {message}")
        self._merge(self._reply, {**chunk, "choices": None})
        self._plain = None
        new_text, stop, delta = "", "", {}
        if self.is_finished:  # the choices are final
            return ""
        for position, choice in enumerate(choices):
            index = position if choice.get("index") is None else choice["index"]
            if not isinstance(index, int):
                raise TypeError
            delta = dict(choice.get("delta") or choice.get("message") or {})
            if piece := delta.get("content"):
                stop = piece if piece == STOP_TOKEN else ""
                text = self._stop_tokens.get(index, "") + piece.removesuffix(stop)
                self._stop_tokens[index], delta["content"] = stop, text
                new_text += text if index == 0 else ""
            merged = self.choices.setdefault(index, {"index": index, "message": {}})
            self._merge(merged["message"], delta)
            rest = {k: v for k, v in choice.items() if k not in ("delta", "message")}
            self._merge(merged, rest)
        reasons = [choice.get("finish_reason") for choice in self.choices.values()]
        self.is_finished = bool(reasons) and all(reasons)
        is_plain = len(choices) == 1 and delta.keys() <= {"role", "content"}
        if new_text and is_plain and not (stop or self.is_finished):
            plain = {**dict.fromkeys(choices[0]), "index": 0, "delta": delta}
            self._plain = {**chunk, "choices": [plain]}
        return new_text

    def _merge(self, target: Any, source: Any, depth: int = 0) -> None:
        """Merge a part of a chunk into what came before, by rules, not by field."""
        if depth > MAX_DEPTH:
            raise RecursionError
        for key, value in source.items():
            old = target.get(key)
            kind: Any = type(value)
            if key in RUNNING_TEXT and kind is str:
                kind = io.StringIO
            if value is None or value == "":
                target.setdefault(key, value)
            elif old and type(old) in MERGED and type(old) is not kind:
                raise TypeError
            elif kind is dict:
                target[key] = old if type(old) is dict else {}
                self._merge(target[key], value, depth + 1)
            elif kind is list:
                target[key] = old if type(old) is list else []
                self._merge_items(target[key], value, depth + 1)
            elif kind is io.StringIO:  # a list of pieces is ten times as large
                if type(old) is not io.StringIO:
                    target[key] = io.StringIO()
                    self._texts.append((target, key, target[key]))
                target[key].write(value)
            else:
                target[key] = value

    def _merge_items(self, target: list[Any], items: Any, depth: int) -> None:
        for item in items:
            index = dig(None, item, "index")
            if index is None:
                target.append(item)
                continue
            place = (id(target), index)
            if place not in self._items:
                self._items[place] = {}
                target.append(self._items[place])
            rest = {key: value for key, value in item.items() if key != "index"}
            self._merge(self._items[place], rest, depth)

    def completion(self) -> Completion:
        """Return what was merged; nothing can be added after that."""
        for target, key, text in self._texts:
            target[key] = text.getvalue()
        reply = {**self._reply, "object": "chat.completion", "choices": []}
        for choice in self.choices.values():
            content = None if choice["message"].get("tool_calls") else ""
            message = {"role": "assistant", "content": content, **choice["message"]}
            reply["choices"].append({**choice, "message": message})
        return Completion(reply)


# ---------------------------------------------------------------- Server-sent events
# (https://html.spec.whatwg.org/multipage/server-sent-events.html)


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytearray]:
    """Yield the lines of a body; these end with LF, CRLF or CR."""
    rest, after_cr = bytearray(), False  # rest: a line whose end has not come
    for piece in pieces:
        rest += piece.removeprefix(b"\n") if after_cr else piece
        after_cr = piece.endswith(b"\r")
        if b"\n" in piece or b"\r" in piece:
            *lines, rest = (rest + b".").splitlines()  # the last has no line end
            rest.pop()
            yield from lines
    if rest:
        yield rest


def split_events(lines: Iterator[bytearray]) -> Iterator[tuple[str, str]]:
    """Yield (event, data) for each event; a complete one may end with the body."""
    name, data = "", []
    first = next(lines, bytearray()).removeprefix(b"\xef\xbb\xbf")
    for line in itertools.chain([first], lines):
        field, _, value = line.decode("utf-8", "replace").partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif field == "event":
            name = value.strip()
        elif not line and data:
            yield name, "\n".join(data).strip()
        if not line:
            name, data = "", []
    rest = "\n".join(data).strip()
    # Without its empty line, data counts if it is complete.
    if name == "error" or rest == "[DONE]" or not isinstance(read_json(rest), str):
        yield name, rest


# ---------------------------------------------------------------------------- Client

OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
LOOPBACK = rf"(?P<loopback>https?://(?:localhost|127(?:\.{OCTET}){{3}}|\[::1\]))"
PORT_AND_PATH = r"(?::(?P<port>\d{1,5}))?(?:/[\w./~%+:@!$&'()*,;=-]*)?"
URL = rf"(?ai)(?:{LOOPBACK}|https://(?:[\w.-]+|\[[0-9a-f:.]+\])){PORT_AND_PATH}"
TOKEN_NAMES = ("DEEPINFRA_TOKEN", "DEEPINFRA_API_KEY", "DEEPINFRA_API_TOKEN")
RETRY_STATUSES = (408, 409, 429, 500, 502, 503, 504)
STATUSES: dict[Any, Any] = {
    range(300, 400): (APIStatusError, ", a redirect: check the base URL"),
    (401, 402, 403): (AuthenticationError, ", check DEEPINFRA_TOKEN and the billing"),
    (404,): (APIStatusError, ", check the model and the base URL"),
    (429, 503): (RateLimitError, ", busy: try later, or less at once"),
    range(1000): (APIStatusError, ""),
}
OVERRUN = r"(?i)context.(length|window)|input.length|maximum.{1,40}token|too long"
SHORTEN = ", over the context (4,096 tokens): shorten it or begin a new conversation"
ADVICE = {  # by exception name; of these only EAI_AGAIN is retried
    "gaierror": " (is there such a host?)",
    "SSLCertVerificationError": " (SSL_CERT_FILE can name its authority)",
    "ModuleNotFoundError": " (https:// needs a Python with ssl)",
}


def log_warning(message: str) -> None:
    import logging  # it takes 4 ms, and most runs do not need it

    logging.getLogger("nemotron").warning("nemotron: %s", one_line(message))


def read_text(pieces: Iterable[bytes]) -> str:
    return b"".join(pieces).decode("utf-8-sig", "replace").strip()


class Exchange:
    """One call: it owns the deadline, the attempts, and what exceptions become."""

    def __init__(self, client: Client, body: JSON, retries: int = 2) -> None:
        self.client, self._payload = client, to_json(body).encode("ascii")
        self.deadline = client._clock() + (client.deadline or math.inf)
        self._retries = retries if client.retries is None else client.retries
        self._retried = 0

    def send(self, read: Callable[[Any], T]) -> T:
        """Send the request and return read(response); again if the error allows it."""
        client, delay = self.client, 0.0
        while True:
            nothing: Any = None  # so far; the body is JSON, or text
            self.status = self.request_id = self.body = nothing
            self._wait(delay)
            try:
                headers = client._headers()
                request = urllib.request.Request(client._url, self._payload, headers)
                with client._lock:  # so that the certificates are read once
                    opener = client._opener
                response = opener.open(request, timeout=self._read_timeout())
                self.status = response.status
                self.request_id = response.headers["x-request-id"]
                if self.status != 200:
                    raise self._status_error(response)
                return read(response)
            except Exception as cause:
                delay = self._delay_after(self.to_error(cause))

    def _delay_after(self, error: NemotronError) -> float:
        """Return the seconds to wait before the next attempt, or raise the error."""
        backoff = min(0.5 * 2**self._retried, 8) * random.uniform(0.75, 1)
        delay = backoff if error.retry_after is None else error.retry_after
        is_late = delay > MAX_DELAY or self.client._clock() + delay >= self.deadline
        if is_late or not error.retryable or self._retried >= self._retries:
            raise error
        self._retried += 1
        log_warning(f"retry {self._retried} in {delay:.1f} s: {error}")
        return delay

    def _wait(self, seconds: float) -> None:
        self.client._sleep(seconds)

    def _read_timeout(self) -> float:
        left = self.deadline - self.client._clock()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return min(self.client.timeout, left)

    def _read_in_time(self, read: Any, sock: Any, buffer: Any) -> Any:
        if self.deadline < math.inf:
            sock.settimeout(self._read_timeout())
        return read(buffer)

    def pieces(self, response: Any) -> Iterator[bytes]:
        """Yield the body as it comes, up to MAX_BYTES since `received` was set to 0."""
        self.received = 0
        with contextlib.suppress(AttributeError):  # it has no socket
            # The one way to bound every read of a body through urllib, in any Python.
            raw, read = response.fp.raw, self._read_in_time
            raw.readinto = functools.partial(read, raw.readinto, raw._sock)
        with response:
            encoding = response.headers["Content-Encoding"] or "identity"
            if encoding.lower() != "identity":
                raise ReplyError("the reply is compressed")
            while piece := response.read1(65536):
                self.received += len(piece)
                if self.received > MAX_BYTES:
                    raise ReplyError(f"a reply or an event of over {MAX_BYTES} bytes")
                yield piece
            if response.length:  # read1 does not complain when the body is too short
                raise http.client.IncompleteRead(b"", response.length)

    def read_completion(self, response: Any) -> Completion:
        text = read_text(self.pieces(response))
        if not text:
            raise http.client.IncompleteRead(b"")
        self.body, merger = read_json(text), ChunkMerger()
        merger.add(self.body, text)
        if not merger.choices or not all(c["message"] for c in merger.choices.values()):
            raise ReplyError("the server sent no reply")
        return Completion(self.body)

    def _status_error(self, response: Any) -> Any:
        with contextlib.suppress(Exception):
            self.body = read_json(read_text(self.pieces(response)))
        message = server_message(self.body) or response.reason or "no message"
        kind, advice = next(v for k, v in STATUSES.items() if self.status in k)
        if self.status in (400, 413, 422, 500) and re.search(OVERRUN, message[:2000]):
            advice = SHORTEN
        error = kind(f"HTTP {self.status} from {self.client._url}{advice}: {message}")
        error.retryable = self.status in RETRY_STATUSES and advice != SHORTEN
        with contextlib.suppress(Exception):  # no such header, or an odd one
            value = response.headers["Retry-After"]
            date = email.utils.parsedate_tz(value)
            delay = email.utils.mktime_tz(date) - time.time() if date else float(value)
            error.retry_after = delay if delay >= 0 else None
        return error

    def to_error(self, cause: Any, kind: Any = APIConnectionError) -> Any:
        """Return the NemotronError for any exception of a call, without the token."""
        error, redact = cause, self.client._redact
        if not isinstance(cause, NemotronError):
            if isinstance(getattr(cause, "reason", None), Exception):
                cause = cause.reason  # of a URLError
            problem = f"no answer from {self.client._url}"
            if kind is IncompleteReplyError:
                problem = "the reply stopped before its end"
            elif isinstance(cause, (TimeoutError, socket.timeout)):  # two until 3.10
                kind = APITimeoutError
            advice = ADVICE.get(type(cause).__name__, "")
            error = kind(f"{problem}: {describe(cause)}{advice}")
            error.retryable = not advice or cause.args[:1] == (socket.EAI_AGAIN,)
            error.__cause__, cause.__cause__, cause.__context__ = cause, None, None
        error.status_code, error.partial = self.status, Completion()
        with contextlib.suppress(RecursionError):
            error.request_id, error.body = redact([self.request_id, self.body])
        for exception in (error, error.__cause__ or error):
            exception.args = redact(exception.args)
        return error


class Client:
    """The settings of calls.  Creating one does no I/O; threads may share it.

    token     None: the first of TOKEN_NAMES in the environment; loopback needs none
    base_url  None: DEEPINFRA_BASE_URL of the environment, else BASE_URL
    model     None: NEMOTRON_MODEL of the environment, else MODEL
    timeout   seconds of silence on the connection
    deadline  seconds for a whole call, with its retries and waits; None: no limit
    retries   how often to send again what may succeed later; None: 2, in a batch 6

    Raises InvalidRequestError for a bad value.
    """

    _clock, _sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

    def __init__(
        self,
        *,
        token: str | None = None,
        base_url: str | None = None,
        model: str | None = None,
        timeout: float | None = 600.0,
        deadline: float | None = None,
        retries: int | None = None,
    ) -> None:
        tokens = [os.environ.get(name, "").strip() for name in TOKEN_NAMES]
        token = next(filter(None, tokens), "") if token is None else token
        if not isinstance(token, str):
            raise InvalidRequestError("token must be a string")  # and is not shown
        self.base_url = base_url or os.environ.get("DEEPINFRA_BASE_URL") or BASE_URL
        self.model = model or os.environ.get("NEMOTRON_MODEL") or MODEL
        self.timeout = 600.0 if timeout is None else timeout
        self.deadline, self.retries = deadline, retries
        for name, value in vars(self).items():
            if value is not None:
                check_value(name, value)
        match = re.fullmatch(URL, self.base_url)
        if not match or not 0 < int(match["port"] or 443) < 65536:
            expected = "https://host[:port][/path], or http:// and a loopback host"
            raise InvalidRequestError(f"base_url must be {expected}")
        self._is_local = bool(match["loopback"])
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._token = token.strip()
        forms = [rf"{re.escape(char)}|(?i:u{ord(char):04x})" for char in self._token]
        pattern = "".join(rf"\\{{0,7}}(?:{form})" for form in forms)
        self._token_pattern = re.compile(pattern)  # each character may be escaped
        self._lock = threading.Lock()

    def chat(self, messages: Messages, **params: Unpack[Params]) -> Completion:
        """Send the messages, and return the whole reply.  Raises NemotronError."""
        exchange = Exchange(self, self._body(messages, params))
        return exchange.send(exchange.read_completion)

    def stream(self, messages: Messages, **params: Unpack[Params]) -> Stream:
        """Send the messages; return the reply as it arrives.  Raises NemotronError."""
        body = {**self._body(messages, params), "stream": True}
        if (body.get("n") or 1) != 1:
            raise InvalidRequestError("n over 1 is not for streams")
        exchange = Exchange(self, body)
        return exchange.send(lambda response: Stream(exchange, response))

    def batch(
        self,
        requests: Iterable[Any],
        jobs: int = 8,
        *,
        output: str | os.PathLike[str] | None = None,
        **params: Unpack[Params],
    ) -> Iterator[JSON]:
        """Send many requests, at most `jobs` (1 to 200) at a time; yield their rows.

        requests  an iterable, read as rows are taken, of strings, of bodies, of objects
                  with a prompt (and system, temperature ...), or of batch file lines
        output    a file to append the rows to; a request that has a row there, without
                  an error, is not sent again, and its row is not yielded
        params    defaults for every request, those of build_request()

        A row is {"id", "custom_id", "request", "response", "error"}, and comes when
        complete.  Raises AuthenticationError for a token that is refused, and
        NemotronError if `output` cannot be written; all other errors are in the rows.
        """
        return Batch(self, requests, jobs, output, params).rows(enumerate(requests, 1))

    def _body(self, messages: Messages, params: Any) -> JSON:
        given = {"model": self.model, **check_parameters(params)}
        return build_request(messages, **given)

    def _redact(self, value: Any) -> Any:
        """Return JSON without the token, escaped or not.  Raises RecursionError."""
        if isinstance(value, dict):
            return {self._redact(k): self._redact(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._redact(item) for item in value]
        if not isinstance(value, (str, bytes)) or len(self._token) < 8:
            return value  # a shorter token may be a word
        text = value if isinstance(value, str) else repr(value)
        return self._token_pattern.sub("[token]", text)

    def _headers(self) -> dict[str, str]:
        token = self._token
        if not (token.isprintable() and token.isascii() and (token or self._is_local)):
            raise AuthenticationError("set a valid DEEPINFRA_TOKEN, or try --offline")
        headers = {"Content-Type": "application/json", "User-Agent": "nemotron.py"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        return headers

    @functools.cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        """urllib's own follows redirects, with the token, and opens file:// URLs."""
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.HTTPHandler())
        opener.add_handler(urllib.request.ProxyHandler({} if self._is_local else None))
        if self._url.lower().startswith("https:"):
            import ssl

            context = ssl.create_default_context()
            opener.add_handler(urllib.request.HTTPSHandler(context=context))
        return opener


class Stream(contextlib.AbstractContextManager["Stream"]):
    """A reply as it arrives: iterating yields the text of choice 0, piece by piece.

    Reading raises IncompleteReplyError if the reply stops before its end, or ReplyError
    if the server sends something else; every later read raises the same error.
    """

    def __init__(self, exchange: Exchange, response: Any) -> None:
        self._exchange, self._response = exchange, response
        self._merger, self._events = ChunkMerger(), self._read_events()
        self._problem: Any = ConnectionError("the connection was closed")

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; nothing more is read."""
        self._events.close()
        self._response.close()

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self._read() if text)

    def __next__(self) -> str:
        return next(iter(self))

    def chunks(self) -> Iterator[Chunk]:
        """Yield every Chunk that is left, instead of the text."""
        return (Chunk(chunk) for chunk, _ in self._read())

    def completion(self) -> Completion:
        """Read the rest, and return the whole reply, with what was read before."""
        collections.deque(self._read(), maxlen=0)
        return self._merger.completion()

    def _read_events(self) -> Generator[tuple[str, str], None, None]:
        exchange, response = self._exchange, self._response
        pieces = exchange.pieces(response)
        first = next(pieces, b"")
        body = itertools.chain([first], pieces)
        kind = response.headers.get_content_type()
        if kind == "application/json" or first[:1] in (b"{", b"<"):  # it is no stream
            yield "", read_text(body)
            yield "", "[DONE]"
        for event in split_events(split_lines(body)):
            exchange.received = 0
            yield event
            if self._merger.is_finished:  # min() keeps the end that is set first
                end = exchange.client._clock() + GRACE
                exchange.deadline = min(exchange.deadline, end)

    def _read(self) -> Iterator[tuple[JSON, str]]:
        merger = self._merger
        try:
            for name, data in self._events:
                chunk = read_json(data)
                if data == "[DONE]":
                    self._problem = None if merger.choices else ReplyError("no reply")
                    break
                if name == "error":
                    chunk = {"error": chunk or "no message"}
                elif data in ("", "null") or data.startswith(":"):
                    continue  # it keeps the connection alive
                try:
                    text = merger.add(chunk, data)
                except ReplyError:
                    if merger.is_finished:  # usage may come even now
                        continue
                    raise
                yield chunk, text
        except Exception as problem:
            self._problem = problem
        self.close()
        if self._problem and not merger.is_finished:
            error = self._exchange.to_error(self._problem, IncompleteReplyError)
            error.partial, self._problem = merger.completion(), error
            raise error


def chat(messages: Messages, **params: Unpack[Params]) -> Completion:
    """Call Client().chat()."""
    return Client().chat(messages, **params)


def stream(messages: Messages, **params: Unpack[Params]) -> Stream:
    """Call Client().stream()."""
    return Client().stream(messages, **params)


def batch(
    requests: Iterable[Any],
    jobs: int = 8,
    *,
    output: str | os.PathLike[str] | None = None,
    **params: Unpack[Params],
) -> Iterator[JSON]:
    """Call Client().batch()."""
    return Client().batch(requests, jobs, output=output, **params)


# ----------------------------------------------------------------------------- Batch

ROW_START = b'{"id": "batch_req_'  # how each row begins


def read_request(item: Any, defaults: JSON) -> JSON:
    """Return the body of a batch request; its own fields go before the defaults."""
    fields: Any = dig({}, item, "body") or item
    if isinstance(item, str):
        fields = {"prompt": item}
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"not an object or a string: {reprlib.repr(fields)}")
    unsent = ("custom_id", "stream", "stream_options")
    fields = {key: value for key, value in fields.items() if key not in unsent}
    messages, prompt = fields.pop("messages", None), fields.pop("prompt", None)
    if (messages is None) == (prompt is None):
        raise InvalidRequestError("a request must have either messages or a prompt")
    extra = {**defaults.get("extra", {}), **fields}
    own = {key: extra.pop(key) for key in REQUEST_NAMES[:-1] if key in fields}
    params = {**defaults, **check_parameters(own), "extra": extra}
    if any(dig("", message, "role") == "system" for message in messages or ()):
        params["system"] = own.get("system")  # the default is for those without one
    return build_request(prompt if messages is None else messages, **params)


@contextlib.contextmanager
def reporting(path: Any, kind: type[NemotronError] = InvalidRequestError) -> Any:
    """Turn an exception about a file into an error that names the file."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        name = "standard input" if path == "-" else path
        raise kind(f"{name}: {describe(error)}") from error


def lock_file(file: Any, wait: bool) -> None:
    """Lock a file until it is closed.  Raises ValueError if another run has it."""
    if sys.platform == "win32":
        return
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ValueError("another run is writing to it") from None
    except (ImportError, OSError) as error:
        log_warning(f"no lock, so do not run it twice at once: {describe(error)}")


class Checkpoint:
    """The file that a batch appends its rows to, and the requests answered in it."""

    def __init__(self, path: Any, source: Any) -> None:
        check_value("output", path)
        self._answered: collections.Counter[bytes] = collections.Counter()
        with reporting(path), contextlib.ExitStack() as stack:
            if os.path.exists(path) and not os.path.isfile(path):
                raise ValueError("not a regular file")
            self.file = stack.enter_context(open(path, "ab", buffering=0))
            with contextlib.suppress(AttributeError, OSError, TypeError):
                if os.path.sameopenfile(source.fileno(), self.file.fileno()):
                    raise ValueError("it is the input, too")
            lock_file(self.file, wait=False)
            with open(path, "rb") as lines:
                self._load(lines)
            stack.pop_all()

    def _load(self, lines: Iterable[bytes]) -> None:
        end = 0
        for number, line in enumerate(lines, 1):
            row, is_whole = read_json(line.decode()), line.endswith(b"\n")
            if is_whole and {"response", "error"} <= dig({}, row).keys():
                self._answered[self._key(row)] += row["error"] is None
            elif is_whole or not ROW_START.startswith(line[: len(ROW_START)]):
                raise ValueError(f"line {number} is not a row")
            else:  # it is torn
                self.file.truncate(end)
            end += len(line)

    def _key(self, row: JSON) -> bytes:
        """Return a digest of a request, and of its name unless that is line-N."""
        import hashlib

        name = re.sub(r"^line-\d+$", "", str(row.get("custom_id")))
        text = json.dumps([name, row.get("request")], sort_keys=True)
        return hashlib.sha256(text.encode()).digest()

    def claim(self, row: JSON) -> bool:
        """Use up an earlier row of this request; return whether there was one."""
        key = self._key(row)
        self._answered[key] -= 1
        return self._answered[key] >= 0

    def append(self, row: JSON) -> None:
        """Write a row.  Once that has failed, nothing more is written."""
        line = json.dumps(row).encode() + b"\n"
        with reporting(self.file.name, NemotronError):
            try:
                while line:  # a full disk takes a part first
                    line = line[self.file.write(line) :]
            except OSError:
                self.file.close()
                raise


def start_thread(target: Any, *args: Any) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


class Batch:
    """Workers, each a thread, that take requests in turn and answer them."""

    FIRST_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds

    def __init__(
        self, client: Client, source: Any, jobs: int, output: Any, params: Any
    ) -> None:
        import logging  # noqa: F401 (later, there may be no file left to load it)
        import queue

        check_value("jobs", jobs)
        client._headers()  # raises for a missing token
        "localhost".encode("idna")  # loads what looking up a host needs
        self.client, self._jobs, self.stopped = client, jobs, threading.Event()
        self._params = {"model": client.model, **check_parameters(params)}
        self._slots: Any = queue.SimpleQueue()  # one is free again once its row is used
        for _ in range(jobs):
            self._slots.put("free")
        self._source_lock = threading.Lock()  # held while a request is taken
        self.lock = threading.RLock()  # garbage collection may call end() anywhere
        self._rows: Any = queue.SimpleQueue()  # and None after the last
        self._names: set[str] = set()
        self._in_flight = self.skipped = 0  # skipped: those that had a row before
        self._has_ended, self._failure = False, None
        self.not_before, self.next_pause = -math.inf, self.FIRST_PAUSE
        self._output = None if output is None else Checkpoint(output, source)

    def rows(self, numbered: Any, parse: Any = lambda item: item) -> Iterator[JSON]:
        """Yield the rows as they come; then raise what has ended the batch early."""
        try:
            for started in range(self._jobs):
                try:
                    start_thread(self._work, numbered, parse)
                except (RuntimeError, MemoryError):  # the system allows no more
                    if not started:
                        raise NemotronError("the system allows no thread") from None
                    break
            for row in iter(self._next_row, None):
                yield row
                self._slots.put("free")
        finally:
            self.end(at_once=True)
            with self.lock:
                if self._output:
                    self._output.file.close()
        if self._failure:
            raise self._failure

    def _next_row(self) -> Any:
        try:
            return self._rows.get()
        except KeyboardInterrupt as error:  # the rows that are complete still come
            self.end(error, at_once=True)
            return self._rows.get()

    def end(self, failure: Any = None, at_once: bool = False) -> None:
        """Take no more requests; at once: drop those in flight, too."""
        with self.lock:
            self._has_ended, self._failure = True, self._failure or failure
            if at_once:
                self.stopped.set()
            if at_once or not self._in_flight:
                self._rows.put(None)
        for _ in range(self._jobs):  # for the workers that wait for a slot
            self._slots.put(None)

    def _work(self, numbered: Any, parse: Any) -> None:
        try:
            for _ in iter(self._slots.get, None):
                with self._source_lock:
                    row, body = self._take(numbered, parse)
                if row:
                    self._answer(row, body)
                else:
                    self._slots.put("free")
        except BaseException as error:
            self.end(None if isinstance(error, StopIteration) else error)

    def _take(self, numbered: Any, parse: Any) -> tuple[JSON, Any]:
        """Take and count a request; return its row and body, empty if it has an answer.

        The caller holds _source_lock.  Raises StopIteration at the end.
        """
        number, item = next(numbered)
        row: JSON = {"id": f"batch_req_{os.urandom(12).hex()}"}
        row.update(custom_id=f"line-{number}", request=None, response=None, error=None)
        body = self._prepare(row, item, parse)
        if body and self._output and self._output.claim(row):
            self.skipped += 1
            return {}, None
        with self.lock:
            if self._has_ended:
                raise StopIteration
            self._in_flight += 1
        return row, body

    def _prepare(self, row: JSON, item: Any, parse: Any) -> Any:
        """Put the name and the request into a row; return the body if it is valid."""
        try:
            item = parse(item)
            name: Any = dig(None, item, "custom_id")
            if not isinstance(name, (str, type(None))):
                raise InvalidRequestError("custom_id must be a string")
            row["custom_id"] = name = row["custom_id"] if name is None else name
            if name in self._names:
                row["error"] = {"code": "duplicate_custom_id", "message": name}
                return None
            self._names.add(name)
            body = json.loads(to_json(read_request(item, self._params)))
            row["request"] = self.client._redact(body)
            return body
        except Exception as error:
            self._set_error(row, error)

    def _set_error(self, row: JSON, error: Any) -> None:
        if not isinstance(error, NemotronError):
            kind = ReplyError if row["request"] else InvalidRequestError
            error = kind(f"{type(error).__name__}: {error}")
        row["error"] = {"code": error.code, "message": self.client._redact(str(error))}

    def _answer(self, row: JSON, body: Any) -> None:
        """Send a request, if it is valid, and pass on its row."""
        try:
            if body:
                self._send(row, body)
            with self.lock:
                if self._output and not self.stopped.is_set():
                    self._output.append(row)
            self._rows.put(row)
        except BaseException as error:  # the output is full, or no memory is left
            self.end(error, at_once=True)
        with self.lock:
            self._in_flight -= 1
            if self._has_ended and not self._in_flight:
                self._rows.put(None)

    def _send(self, row: JSON, body: JSON) -> None:
        exchange, redact = BatchExchange(self, body), self.client._redact
        try:
            exchange.send(exchange.read_completion)
            self.next_pause = self.FIRST_PAUSE
            reply = redact(exchange.body)
        except Exception as error:
            self._set_error(row, error)
            reply = getattr(error, "body", None)
            if isinstance(error, AuthenticationError):
                self.end(error)
        if exchange.status:
            row["response"] = {"status_code": exchange.status, "body": reply}
            row["response"]["request_id"] = redact(exchange.request_id)


class BatchExchange(Exchange):
    """A call of a batch, whose calls share the pauses that a busy server needs."""

    def __init__(self, batch: Batch, body: JSON) -> None:
        super().__init__(batch.client, body, 6)
        self._batch, self._paused = batch, 0.0

    def _wait(self, seconds: float) -> None:
        """Wait these seconds, and for the pause, but not past the deadline."""
        clock, batch = self.client._clock, self._batch
        until = clock() + seconds
        while (left := min(max(until, batch.not_before), self.deadline) - clock()) > 0:
            if batch.stopped.wait(left):
                raise NemotronError("the batch was stopped")
        self._last_pause = batch.not_before

    def _delay_after(self, error: NemotronError) -> float:
        """Pause all calls when the server is busy; this uses up no retry."""
        batch, now, timeout = self._batch, self.client._clock(), self.client.timeout
        is_full = getattr(error.__cause__, "errno", 0) in (errno.EMFILE, errno.ENFILE)
        if not is_full and not isinstance(error, RateLimitError):
            return super()._delay_after(error)
        delay = error.retry_after or 0.0
        if delay > timeout or self._paused >= timeout:
            raise error
        if is_full:
            delay = 0.1  # until another call has ended
        else:
            with batch.lock:
                # The first call of those sent before it begins a pause.
                if self._last_pause == batch.not_before:
                    if not delay:
                        delay = batch.next_pause
                        batch.next_pause = min(2 * delay, batch.MAX_PAUSE)
                    log_warning(f"all workers pause for {delay:.1f} s: {error}")
                batch.not_before = max(batch.not_before, now + delay)
                delay = batch.not_before - now
        self._paused += delay
        if now + delay >= self.deadline:
            raise error
        return delay


# -------------------------------------------------------------------- Offline server


@contextlib.contextmanager
def offline(**settings: Any) -> Iterator[Client]:
    """A Client for a server in this process, which echoes the last user message."""
    import socketserver

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # the client has gone
                self.rfile.readline()
                size = http.client.parse_headers(self.rfile)["Content-Length"] or 0
                body = self.rfile.read(int(size)).decode("utf-8", "replace")
                kind, answer = echo(read_json(body))
                head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close"
                self.wfile.write(f"{head}\r\n\r\n{answer}".encode("ascii"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.socket.listen(1024)  # connections at once
        start_thread(server.serve_forever, 0.01)  # seconds to notice the shutdown
        url = f"http://127.0.0.1:{server.server_address[1]}/v1/openai"
        try:
            yield Client(**{**settings, "token": "", "base_url": url})
        finally:
            server.shutdown()


def echo(request: Any) -> tuple[str, str]:
    """Return the media type and the text of a reply: the last user message."""
    messages: list[Any] = dig([], request, "messages")
    turns = [turn for turn in messages if dig("", turn, "role") == "user"]
    content: Any = dig(None, turns, -1, "content")
    parts = content if isinstance(content, list) else [{"text": content}]
    text = "".join(dig("", part, "text") for part in parts)
    words = re.findall(r"\s*\S+|\s+$", text)
    usage = {"prompt_tokens": len(words), "completion_tokens": len(words)}
    usage.update(total_tokens=2 * len(words), estimated_cost=0)

    def reply(key: str, text: str, reason: str | None, **fields: Any) -> str:
        part = {key: {"role": "assistant", "content": text}, "finish_reason": reason}
        choices = [{"index": i, **part} for i in range(dig(1, request, "n"))]
        kind = "chat.completion" if key == "message" else "chat.completion.chunk"
        head = {"id": "chatcmpl-offline", "object": kind, "created": int(time.time())}
        head["model"] = dig("", request, "model")
        return to_json({**head, "choices": choices, **fields})

    if not dig(False, request, "stream"):
        return "application/json", reply("message", text, "stop", usage=usage)
    chunks = [reply("delta", word, None) for word in words]
    chunks += [reply("delta", STOP_TOKEN, "stop", usage=usage), "[DONE]"]
    return "text/event-stream", "".join(f"data: {chunk}\n\n" for chunk in chunks)


# --------------------------------------------------------------- Command line: options

USAGE = "%(prog)s [options] [PROMPT ...]"
HELP = f"Send PROMPT and piped input to {MODEL}.\nThe token is in DEEPINFRA_TOKEN."
HELP_END = """\
examples:
  %(prog)s 'Name two techniques to cook lamb.'
  git diff | %(prog)s -s 'Be brief.' 'Write a commit message for this diff.'
  %(prog)s --batch topics.txt --output rows.jsonl 'Write a question about {}.'

exit status:
  0    every reply is complete
  1    the API or the network failed; a batch has error rows
  2    usage: nothing was sent
  3    a reply is not complete; a batch was stopped by --max-cost
  4    DEEPINFRA_TOKEN is missing or refused (401, 402, 403)
  5    busy after all retries (429, 503)
  130  Ctrl-C
  141  standard output was closed"""
OPTIONS = read_table("""\
request | -s --system | TEXT | system message
request | -m --model | ID | model; default: NEMOTRON_MODEL
request | -o --option | KEY VALUE | any field; VALUE is JSON, @FILE or a string
request | -n --no-stdin | | leave standard input alone
request | --no-stream | | wait for the whole reply
request | -u --usage | | show tokens, cost and seconds
prompt | -c --conversation | PATH | continue the conversation in FILE
prompt | -i --interactive | | chat, a turn a line; exit or Ctrl-D ends it
prompt | --json | | print the server's JSON
prompt | --dry-run | | print the JSON body only
batch | --batch | FILE | send each line of FILE (-: standard input)
batch | --output | FILE | append the rows to FILE; skip what has one there
batch | -j --jobs | an integer | requests at a time, 1 to 200; default: 8
batch | --max-cost | a number | send no more after so many US dollars
server | --base-url | URL | default: DEEPINFRA_BASE_URL
server | --timeout | a number | seconds of silence; default: 600
server | --deadline | a number | seconds for a whole call
server | --retries | an integer | attempts after the first; default: 2, in a batch 6
server | --offline | | use a built-in server, which echoes the prompt""")


def parse_options(argv: list[str]) -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise InvalidRequestError(f"{message} (see -h)")

    parser = Parser(usage=USAGE, description=HELP, epilog=HELP_END, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    kinds: dict[str, JSON] = {
        "": {"action": "store_true", "default": None},
        "PATH": {"metavar": "FILE", "type": os.path.realpath},
        "KEY VALUE": {"action": "append", "nargs": 2, "metavar": ("KEY", "VALUE")},
        "a number": {"type": float, "metavar": "X"},
        "an integer": {"type": int, "metavar": "N"},
        "a string or a list of 1 to 16": {"action": "append", "metavar": "TEXT"},
    }
    rows = OPTIONS + [
        ["sampling", "--" + name.replace("_", "-"), kind, f"{limits or kind}: {text}"]
        for name, kind, limits, _, text in PARAMETERS
        if name not in ("n", "tools", "response_format")  # which need -o
    ]
    groups = {row[0]: parser.add_argument_group(row[0]) for row in rows}
    for title, flags, kind, text in rows:
        settings = kinds.get(kind, {"metavar": kind if kind.isupper() else "TEXT"})
        groups[title].add_argument(*flags.split(), help=text, **settings)
    argv = [os.fsencode(arg).decode("utf-8", "surrogateescape") for arg in argv]
    end = argv.index("--") if "--" in argv else len(argv)  # after it, all are words
    args = parser.parse_intermixed_args(argv[:end])
    args.words += argv[end + 1 :]
    args.stream = not (args.json or args.no_stream or args.batch)
    return args


def read_params(args: Any) -> JSON:
    """Return the parameters; check that the options go together."""
    excluded = "batch" if args.batch is None else "prompt"
    for title, flags, _, _ in OPTIONS:
        name = flags.partition("--")[2].replace("-", "_")
        if title == excluded and getattr(args, name) is not None:
            raise InvalidRequestError(f"{flags} is only for a {title}")
    if sys.stdout is None and args.output is None:
        raise InvalidRequestError("standard output is closed")
    extra: JSON = {}
    for key, value in args.option or ():
        extra[key] = read_json(read_file(value[1:]) if value[:1] == "@" else value)
    if args.usage and args.stream:
        extra.setdefault("stream_options", {"include_usage": True})
    if extra.get("n", 1) != 1 and not (args.json or args.batch or args.dry_run):
        raise InvalidRequestError("n over 1 needs --json or --batch")
    params = {row[0]: getattr(args, row[0], None) for row in PARAMETERS}
    return check_parameters({**params, "extra": extra})


# ------------------------------------------- Command line: one reply and conversations


def warn(message: object) -> None:
    with contextlib.suppress(OSError, ValueError):  # it may be full or closed
        print("nemotron:", one_line(str(message)), file=sys.stderr, flush=True)


def write_reply(pieces: Iterable[str]) -> None:
    """Write a reply: no white space before it, and one newline after it."""
    show = escape_controls if sys.stdout.isatty() else str
    begun, held = False, ""  # held: newlines, which may be the last
    try:
        for piece in pieces:
            piece = piece if begun else piece.lstrip()
            held += piece
            if piece.strip("\r\n"):
                begun, line = True, held.rstrip("\r\n")
                held = held[len(line) :]
                sys.stdout.write(show(line))
                sys.stdout.flush()
        begun = True  # an empty reply is an empty line
    finally:
        if begun:
            print(flush=True)


def open_input(path: str) -> Any:
    """Open a file, or standard input for "-", for which it may have to wait."""
    with reporting(path):
        if path != "-":
            return open(path, "rb")
        # Not sys.stdin, whose lock a thread may still hold at the end.
        file = open(os.dup(sys.stdin.fileno()), "rb")
        if sys.platform != "win32":
            os.set_blocking(file.fileno(), True)  # else silence is taken for the end
        timer = threading.Timer(2.0, warn, ["waiting for standard input (or use -n)"])
        timer.daemon = True
        timer.start()
        file.peek(1)
        timer.cancel()
        return file


def read_file(path: str) -> str:
    with open_input(path) as file, reporting(path):
        return str(file.read(), "utf-8-sig")


def read_prompt(words: list[str], no_stdin: bool) -> str:
    """Return the words, with standard input after them or in place of "-"."""
    if no_stdin or ("-" not in words and sys.stdin.isatty()):
        return " ".join(words)
    place = words.index("-") if "-" in words else len(words)
    before, after = " ".join(words[:place]), " ".join(words[place + 1 :])
    text = read_file("-").rstrip("\r\n")
    return "\n\n".join(filter(None, (before, text, after)))


def read_turns(words: list[str]) -> Iterator[str]:
    """Yield the turns of a chat: the words, then standard input line by line."""
    yield " ".join(words)
    if not sys.stdin.isatty():
        yield from (str(line, "utf-8-sig", "replace") for line in open_input("-"))
        return
    warn("exit or Ctrl-D ends the chat, Ctrl-C drops a turn")
    with contextlib.suppress(ImportError):
        import readline

        if sys.platform != "win32":  # a paste is one turn
            readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            if not sys.stdout.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            yield input("> " if sys.stdout.isatty() else "")
        except (KeyboardInterrupt, EOFError) as error:
            print(file=sys.stderr)
            if isinstance(error, EOFError):
                return


def load_conversation(path: str) -> list[JSON] | None:
    """Return the messages in a file; None if there is no file."""
    with reporting(path):
        tempfile.TemporaryFile(dir=os.path.dirname(path)).close()  # or it is too late
        if not os.path.exists(path):
            return None
        if not os.path.isfile(path):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            return check_messages(json.load(file))


def save_conversation(path: str, before: Any, after: list[JSON]) -> None:
    """Replace the messages in a file, unless they are no longer those before."""
    folder = os.path.dirname(path)
    with reporting(path, NemotronError), contextlib.ExitStack() as stack:
        if sys.platform != "win32":  # Windows cannot open a folder
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            lock_file(lock, wait=True)
        if load_conversation(path) != before:
            raise NemotronError(f"{path} was changed meanwhile")
        temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        with tempfile.NamedTemporaryFile("w", dir=temporary, delete=False) as file:
            print(json.dumps(after, indent=1), file=file)
        with contextlib.suppress(OSError):  # a new file is 0600
            shutil.copymode(path, file.name)
        os.replace(file.name, path)


def finish_problem(reply: Completion) -> str:
    """Return why the reply is not complete; "" if it is."""
    choices: list[Any] = dig([], reply, "choices")
    reasons = {dig("", choice, "finish_reason") for choice in choices}
    return ", ".join(sorted(reasons.intersection(INCOMPLETE)))


def format_cost(cost: float | None) -> str:
    if cost is None or math.isnan(cost):
        return "cost unknown"
    return f"${cost:.8f}".rstrip("0").rstrip(".")


def send_turn(args: Any, saved: Any, prompt: str) -> tuple[list[JSON], int]:
    """Send one more prompt; return all messages, and the exit status."""
    messages, began = list(saved or []), time.monotonic()
    if prompt:
        messages.append({"role": "user", "content": prompt})
    if not messages:
        raise InvalidRequestError("no prompt: nemotron.py [options] [PROMPT ...]")
    if args.system is not None:
        messages = [m for m in messages if m["role"] != "system"]
        messages.insert(0, {"role": "system", "content": args.system})
    if args.dry_run:
        body = build_request(messages, stream=args.stream, **args.params)
        print(to_json(body), flush=True)
        return messages, 0
    if args.stream:
        with args.client.stream(messages, **args.params) as stream:
            write_reply(stream)
            reply = stream.completion()
    else:
        reply = args.client.chat(messages, **args.params)
        write_reply([json.dumps(reply) if args.json else reply.text])
    problem = finish_problem(reply)
    if problem:
        warn(f"the reply is not complete: finish_reason {problem}")
    if args.usage:
        seconds, answered = time.monotonic() - began, dig("", reply, "model")
        sent = reply.usage.get("prompt_tokens", "?")
        tokens = f"{sent} + {reply.usage.get('completion_tokens', '?')} tokens"
        other = f", model {answered}" if answered not in ("", args.client.model) else ""
        usage = f"{tokens}, {format_cost(reply.cost)}, {seconds:.1f} s{other}"
        warn(args.client._redact(usage))
    messages.append(reply.message)
    if args.conversation:
        save_conversation(args.conversation, saved, messages)
    return messages, 3 if problem else 0


def converse(args: Any) -> int:
    """Send one prompt, or each turn of a chat."""
    saved = load_conversation(args.conversation) if args.conversation else None
    if args.no_stdin or args.dry_run or not args.interactive:
        prompt = read_prompt(args.words, args.no_stdin)
        return send_turn(args, saved, prompt)[1]
    args.client._headers()  # without a token, no turn succeeds
    for text in filter(None, map(str.strip, read_turns(args.words))):
        if text == "exit":
            break
        try:
            saved, _ = send_turn(args, saved, text)
        except (NemotronError, KeyboardInterrupt) as error:
            warn(str(error) or "stopped, this turn is dropped")
    return 0


# ------------------------------------------------ Command line: batches, and the start


def draw(text: str) -> None:
    if sys.stderr.isatty():
        width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
        print(f"\r{text[:width].ljust(width)}\r", end="", file=sys.stderr, flush=True)


class Progress:
    """What has become of a batch so far, and why it is to stop."""

    def __init__(self, batch: Batch, total: int, max_cost: float | None) -> None:
        self.batch, self.total, self.max_cost = batch, total, max_cost
        self.began, self.cost, self.stop_reason = time.monotonic(), 0.0, ""
        self.done = self.failed = self.failed_in_a_row = 0
        self.problems: collections.Counter[str] = collections.Counter()

    def add(self, row: JSON) -> None:
        self.done += 1
        if row["error"]:
            if not self.failed:
                draw("")
                warn(f"first failure, {row['custom_id']}: {row['error']['message']}")
            self.failed += 1
            self.failed_in_a_row += row["request"] is not None
            self.problems[row["error"]["code"]] += 1
            if self.failed_in_a_row >= 20:
                self.stop_reason = "stopped by 20 failures in a row"
                self.batch.end()
            return
        reply = Completion(row["response"]["body"])
        self.failed_in_a_row = 0
        if finish_problem(reply):
            self.problems["not complete"] += 1
        self.cost += math.nan if reply.cost is None or reply.cost < 0 else reply.cost

    def goes_on(self, _: object) -> bool:
        """Return whether to send one more; if not, set stop_reason."""
        if self.max_cost is not None and not self.cost < self.max_cost:
            self.stop_reason = "stopped by --max-cost (or a cost is unknown)"
        return not self.stop_reason

    def summary(self) -> str:
        seconds = max(time.monotonic() - self.began, 0.001)
        rate, done = self.done / seconds, self.done + self.batch.skipped
        parts = [f"{done} of {self.total or '?'} done, {self.failed} failed"]
        parts += [f"{count} {name}" for name, count in self.problems.items()]
        parts += [f"{rate:.1f}/s, {format_cost(self.cost)}, {seconds:.1f} s"]
        if rate and self.total > done and not self.batch.stopped.is_set():
            parts.append(f"{(self.total - done) / rate:.0f} s left")
        return ", ".join(filter(None, [*parts, self.stop_reason]))


def parse_line(line: bytes, template: str) -> Any:
    text = line.decode("utf-8-sig").strip()
    item = json.loads(text) if text.startswith(("{", "[", '"')) else text
    return template.replace("{}", item) if isinstance(item, str) else item


def run_batch(args: Any) -> int:
    check_value("max_cost", args.max_cost or 0)
    template = " ".join(args.words) or "{}"
    if "{}" not in template:
        template += "\n\n{}"
    file, total = open_input(args.batch), 0
    if os.path.isfile(args.batch):
        total = sum(1 for line in file if line.strip())
        file.seek(0)
    params = {**args.params, "system": args.system}
    jobs = 8 if args.jobs is None else args.jobs
    batch = Batch(args.client, file, jobs, args.output, params)
    progress = Progress(batch, total, args.max_cost)
    numbered = (pair for pair in enumerate(file, 1) if pair[1].strip())
    lines = itertools.takewhile(progress.goes_on, numbered)
    try:
        for row in batch.rows(lines, lambda line: parse_line(line, template)):
            try:
                if args.output is None:
                    print(json.dumps(row), flush=True)
                progress.add(row)
                draw(progress.summary())
            except KeyboardInterrupt as error:  # the rows that are complete still come
                batch.end(error, at_once=True)
    finally:
        draw("")
        warn(progress.summary())
        if args.batch != "-":
            file.close()
    status = 1 if progress.failed else 3
    return status if progress.problems or progress.stop_reason else 0


def run(argv: list[str]) -> int:
    args = parse_options(argv)
    args.params = read_params(args)
    names = ("model", "base_url", "timeout", "deadline", "retries")
    settings = {name: getattr(args, name) for name in names}
    server: Any = offline(**settings) if args.offline else None
    with server or contextlib.nullcontext(Client(**settings)) as args.client:
        args.params["model"] = args.client.model
        return converse(args) if args.batch is None else run_batch(args)


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    sys.stdin = sys.stdin or open(os.devnull)  # where it is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        files: Any = (sys.stdin, sys.stdout, sys.stderr)
        for file in filter(None, files):
            file.reconfigure(encoding="utf-8", errors="replace")
        with contextlib.suppress(SystemExit):  # of -h and --version
            return run(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt:
        return 130
    except NemotronError as error:
        warn(error)
        return error.exit_status
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        with contextlib.suppress(OSError, AttributeError):  # or exiting fails again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        closed = errno.EPIPE if sys.platform != "win32" else errno.EINVAL
        if getattr(error, "errno", 0) == closed:
            return 141
        name = getattr(error, "filename", type(error).__name__) or "standard output"
        warn(f"{name}: {describe(error)}")
        return 1


if __name__ == "__main__":
    os._exit(main())  # tearing Python down takes time
