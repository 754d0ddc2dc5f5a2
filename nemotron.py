#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The nemotron.py authors
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Talk to Nemotron-4-340B-Instruct, or any OpenAI-compatible chat endpoint.

    $ python3 nemotron.py 'Hello!'
    >>> nemotron.chat("Hello!").text

A reply is complete, or it is an error.
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
import select
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress

TYPE_CHECKING = False  # importing typing takes 2 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
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

    class BatchParams(Params, total=False):
        output: str | os.PathLike[str] | None


__version__ = "2.0.0"
__all__ = ["MODEL", "BASE_URL", "chat", "stream", "batch", "build_request", "Client"]
__all__ += ["Completion", "Chunk", "Stream", "offline", "main", "NemotronError"]
__all__ += ["InvalidRequestError", "APIConnectionError", "APITimeoutError"]
__all__ += ["APIStatusError", "AuthenticationError", "RateLimitError", "ReplyError"]
__all__ += ["IncompleteReplyError"]

MODEL = "nvidia/Nemotron-4-340B-Instruct"
BASE_URL = "https://api.deepinfra.com/v1/openai"
MAX_BYTES = 64 << 20  # of a reply, or of one server-sent event
MAX_DEPTH = 100  # levels of nesting in errors and rows; JSON of any Python goes so far
MAX_DELAY = 120.0  # seconds; a server that asks for more is not tried again
GRACE = 5.0  # seconds to read on after the end of a streamed reply

# ---------------------------------- Errors

CONTROLS = "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"


def escape_controls(text: str) -> str:
    return re.sub(CONTROLS, lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    line = escape_controls(" ".join(text[:1000].split()))
    return line if len(line) <= 280 else line[:277] + "..."


def describe(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class NemotronError(Exception):
    """Base class; str() of an error is a line of at most 280 characters."""

    code, exit_status = "error", 1  # in a row of a batch; of the command line
    retryable = False  # whether the same request may succeed later
    status_code: int | None = None
    request_id: str | None = None
    retry_after: float | None = None  # seconds
    body: Any = None  # of the response: JSON, or text
    partial: Completion  # what was received

    def __init_subclass__(cls, code: str = "", status: int = 0) -> None:
        cls.code, cls.exit_status = code or cls.code, status or cls.exit_status

    def __str__(self) -> str:
        return one_line(super().__str__())


class InvalidRequestError(NemotronError, ValueError, code="invalid_request", status=2):
    """The caller's mistake; nothing was sent."""


class APIConnectionError(NemotronError, code="connection"):
    """No usable connection to the server."""


class APITimeoutError(APIConnectionError, TimeoutError, code="timeout"):
    """`timeout` or `deadline` has passed (in a stream: before its status 200)."""


class APIStatusError(NemotronError, code="api_status"):
    """The server answered with a status other than 200."""


class AuthenticationError(APIStatusError, code="authentication", status=4):
    """Status 401, 402 or 403; or no usable token, and status_code is None."""


class RateLimitError(APIStatusError, code="rate_limit", status=5):
    """Status 429 or 503: the server is busy."""


class ReplyError(NemotronError, code="reply"):
    """Status 200, but not an answer."""


class IncompleteReplyError(ReplyError, code="incomplete_reply", status=3):
    """The stream stopped before the reply ended."""


# ------------------------------ Parameters


def require(condition: Any, problem: str) -> None:
    if not condition:
        raise InvalidRequestError(problem)


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


KINDS: dict[str, Any] = {
    "a number": lambda x: isinstance(x, (int, float)),
    "an integer": lambda x: isinstance(x, int),
    "a string": lambda x: isinstance(x, str),
    "a path": lambda x: isinstance(x, (str, os.PathLike)),
    "none or auto": lambda x: x in ("none", "auto"),
    "a string or a list of 1 to 16": lambda x: (
        isinstance(x, str) or is_list_of(str, x) and 0 < len(x) <= 16
    ),
    "a list of objects": lambda x: is_list_of(dict, x),
    "an object": lambda x: isinstance(x, dict),
}


def read_table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")] for row in text.splitlines()]


# From the provider's OpenAPI file: name | kind | limits | server's default | help
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
    kind, limits = SPECS[name][1:3]
    valid = KINDS[kind](value) and not isinstance(value, bool)
    if valid and limits:
        low, sign, _, _, high = limits.split()
        valid = float(low) <= value <= int(high) and (sign != "<" or value > float(low))
    require(valid, f"{name} is {reprlib.repr(value)}, must be {kind} {limits}")


def check_parameters(values: Any) -> JSON:
    """Return the values that are not None.  Raises InvalidRequestError."""
    for name, value in values.items():
        if name not in REQUEST_NAMES:
            import difflib

            near = difflib.get_close_matches(name, REQUEST_NAMES, 1, 0.0)[0]
            unknown = f"unknown; did you mean {near}? (Other fields go into extra.)"
            raise InvalidRequestError(f"{name:.80}: {SPECS.get(name, [unknown])[-1]}")
        if value is not None:
            check_value(name, value)
    return {name: value for name, value in values.items() if value is not None}


# --------------------------------- Request


def dig(default: T, value: Any, *path: Any) -> T:
    """Return value[path[0]]..., or default if that is absent or of another type."""
    try:
        for key in path:
            value = value[key]
    except (LookupError, TypeError):
        return default
    return value if default is None or isinstance(value, type(default)) else default


raw_decode = json.JSONDecoder().raw_decode


def read_json(text: str) -> Any:
    """Return the value of a JSON text, or the text if it is not JSON."""
    try:
        value, end = raw_decode(text.strip())  # faster than json.loads()
    except (ValueError, RecursionError):
        return text
    return value if end == len(text.strip()) else text


def to_json(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"not JSON: {error}") from None


ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: Any, systems: int = 0) -> list[JSON]:
    require(isinstance(messages, (list, tuple)), "messages must be a list")
    for index, message in enumerate(messages):
        where, role = f"messages[{index}]:", dig("", message, "role")
        content = dig(None, message, "content")
        is_valid = isinstance(content, str) or content and is_list_of(dict, content)
        if role == "assistant" and content is None:
            is_valid = dig(None, message, "tool_calls")
        systems += role == "system"
        has_id = role != "tool" or dig("", message, "tool_call_id")
        require(role in ROLES, f"{where} role must be one of {ROLES}")
        require(systems < 2, f"{where} a second system message")
        require(is_valid, f"{where} content must be a string or a list of objects")
        require(has_id, f"{where} a tool message must have a tool_call_id")
    return [dict(message) for message in messages]


def build_request(
    messages: Messages, *, stream: bool = False, **params: Unpack[Params]
) -> JSON:
    """Return the JSON body of a request.  Raises InvalidRequestError.

    messages  a string, which is one user message, or a list of message objects
    system    a system message to put in front of them
    params    model, and the names in PARAMETERS; what is not given is not sent
    extra     other fields, which are not checked
    """
    given = check_parameters(params)
    fields, system = given.pop("extra", {}), given.pop("system", None)
    for name in ("messages", "model", "stream"):
        require(name not in fields, f"extra must be without {name}")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    first = [] if system is None else [{"role": "system", "content": system}]
    checked = check_messages(messages, len(first))
    turns = [(i, m["role"]) for i, m in enumerate(checked) if m["role"] != "system"]
    last, role = turns[-1] if turns else (0, "")
    require(role in ("user", "tool"), f"messages[{last}]: last must be user or tool")
    body = {"model": MODEL, "messages": first + checked, **given, **fields}
    return {**body, "stream": True} if stream else body


# ----------------------------------- Reply

STOP_TOKEN = "</s>"  # the model's own, the last piece of text
INCOMPLETE = ("length", "content_filter", "abort", "error")  # finish_reason
RUNNING_TEXT = ("content", "reasoning_content", "reasoning", "refusal", "arguments")


class Completion(dict[str, "Any"]):
    """The server's JSON, untouched; the properties are of choice 0, and never raise."""

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
        """Such as "stop" or "length"; None if not finished."""
        return self._dig("", "finish_reason") or None

    @property
    def usage(self) -> JSON:
        """prompt_tokens, completion_tokens ...; {} if there is none."""
        return dig({}, self, "usage")

    @property
    def cost(self) -> float | None:
        """US dollars: `usage.estimated_cost`, else `usage.cost`; None if unknown."""
        costs: Any = map(self.usage.get, ("estimated_cost", "cost"))
        known = (c for c in costs if type(c) in (int, float) and abs(c) < 1e9)
        return next(known, None)

    @property
    def tool_calls(self) -> list[JSON]:
        """The tool calls; [] if there are none."""
        calls: list[JSON] = self._dig([], "message", "tool_calls")
        return calls if is_list_of(dict, calls) else []

    @property
    def message(self) -> JSON:
        """The reply as an assistant message, for the next request."""
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}


class Chunk(Completion):
    """One `chat.completion.chunk` of a stream."""


def server_message(answer: Any) -> str:
    """Return what the server says went wrong, or ""."""
    names = ("error", "detail", "error_message", "message", "msg")
    while isinstance(answer, (dict, list)):
        values: Any = map(answer.get, names) if isinstance(answer, dict) else answer
        answer = next((v for v in values if v and isinstance(v, (str, dict, list))), "")
    is_text = isinstance(answer, str) and answer.lstrip()[:1] != "<"  # HTML
    return answer if is_text else ""


class ChunkMerger:
    def __init__(self) -> None:
        self.choices: Any = {}  # by index
        self.is_finished = False  # whether every choice that came has a finish_reason
        self._reply: JSON = {}  # without the choices
        self._texts: Any = []  # (object, key, io.StringIO) of all running text
        self._items: Any = {}  # by the id of their list and their index
        self._held = ""  # a stop token, which is text if more follows
        self._plain: Any = None  # the last chunk, if it has only text

    def add(self, chunk: Any, source: str) -> str:
        """Return the text that a chunk adds to choice 0.  Raises ReplyError."""
        try:  # most chunks differ from the last in their text only
            choices = chunk.get("choices") or [{}]
            text = (choices[0].get("delta") or {}).get("content") or ""
            if self._plain and text not in ("", STOP_TOKEN):
                self._plain["choices"][0]["delta"]["content"] = text
                if chunk == self._plain:
                    self.choices[0]["message"]["content"].write(text)
                    return str(text)
            return self._add(chunk)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
            said = server_message(source)
            raise ReplyError(f"the server sent an odd chunk: {said}") from None

    def _add(self, chunk: JSON) -> str:
        choices: Any = [] if self.is_finished else chunk.get("choices") or []
        errors = [part for part in (chunk, *choices) if part.get("error")]
        said = server_message(errors if choices else chunk)
        if errors or said:
            raise ReplyError(f"the server sent an error, or no reply: {said}")
        self._merge(self._reply, {**chunk, "choices": None})
        self._plain, new_text, delta = None, "", {}
        for choice in choices:
            index = round(choice.get("index") or 0)  # raises for what is no number
            delta = dict(choice.get("delta") or choice.get("message") or {})
            piece = delta.get("content")
            if index == 0 and piece not in (None, ""):
                text = self._held + piece
                self._held = piece if piece == STOP_TOKEN else ""
                delta["content"] = text.removesuffix(self._held)
                new_text += delta["content"]
            merged = self.choices.setdefault(index, {"index": index, "message": {}})
            self._merge(merged["message"], delta)
            rest = {k: v for k, v in choice.items() if k not in ("delta", "message")}
            self._merge(merged, rest)
        reasons = [choice.get("finish_reason") for choice in self.choices.values()]
        self.is_finished = bool(reasons) and all(reasons)
        is_plain = new_text and delta.keys() <= {"role", "content"}
        if is_plain and not (self._held or self.is_finished):
            plain = {**dict.fromkeys(choices[0]), "index": 0, "delta": delta}
            self._plain = {**chunk, "choices": [plain]}
        return new_text

    def _merge(self, target: Any, source: Any) -> None:
        for key, value in source.items():
            old = target.get(key)
            if value is None or value == "":
                target.setdefault(key, value)
            elif isinstance(value, (dict, list)):
                target[key] = old or type(value)()
                merge = self._merge if isinstance(value, dict) else self._merge_items
                merge(target[key], value)
            elif isinstance(value, str) and key in RUNNING_TEXT:
                if not old:  # a list of pieces would be ten times as large
                    target[key] = io.StringIO()
                    self._texts.append((target, key, target[key]))
                target[key].write(value)
            elif isinstance(old, (dict, list, io.StringIO)):
                raise TypeError
            else:
                target[key] = value

    def _merge_items(self, target: list[Any], items: Any) -> None:
        for item in items:
            index = dig(None, item, "index")
            if index is None:
                target.append(item)
                continue
            place = (id(target), index)
            if place not in self._items:
                target.append(self._items.setdefault(place, {}))
            rest = {key: value for key, value in item.items() if key != "index"}
            self._merge(self._items[place], rest)

    def completion(self) -> Completion:
        for target, key, text in self._texts:
            target[key] = text.getvalue()
        choices = list(self.choices.values())
        for choice in choices:
            message = choice["message"]
            message.setdefault("role", "assistant")
            message.setdefault("content", None if message.get("tool_calls") else "")
        return Completion(self._reply, object="chat.completion", choices=choices)


# ---------------------- Server-sent events


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytearray]:
    """Yield the lines of a body; these end with LF, CRLF or CR."""
    rest, after_cr = bytearray(), False  # rest: a line without its end
    for piece in pieces:
        new = piece.removeprefix(b"\n") if after_cr else piece
        after_cr = piece.endswith(b"\r")
        for part in new.splitlines(keepends=True):
            rest += part
            if part.endswith((b"\n", b"\r")):
                yield rest.rstrip(b"\r\n")
                rest.clear()
    if rest:
        yield rest


def split_events(lines: Iterable[bytearray]) -> Iterator[tuple[str, str]]:
    """Yield (event, data) for each event; a complete one may end with the body."""
    name = data = ""
    for line in lines:  # the first may begin with a BOM
        field, _, value = str(line, "utf-8", "replace").lstrip("\ufeff").partition(":")
        if field == "data":
            data += value.removeprefix(" ") + "\n"
        elif field == "event":
            name = value.strip()
        elif not line:
            yield name, data.strip()
            name = data = ""
    data = data.strip()
    # Without its empty line, data counts if it is complete.
    if name == "error" or data == "[DONE]" or not isinstance(read_json(data), str):
        yield name, data


# ---------------------------------- Client

LOOPBACK = r"localhost|\[::1]|127(\.(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)){3}"
HOST = rf"https?://(?P<loopback>{LOOPBACK})|https://([\w.-]+|\[[0-9a-f:.]+])"
URL = rf"(?ai)({HOST})(:(?P<port>\d+))?(/[\w./~%+:@=-]*)?"
TOKEN_NAMES = ("DEEPINFRA_TOKEN", "DEEPINFRA_API_KEY", "DEEPINFRA_API_TOKEN")
RETRIED = (408, 409, 429, 500, 502, 503, 504)
STATUSES: dict[Any, Any] = dict.fromkeys((401, 402, 403), AuthenticationError)
STATUSES |= dict.fromkeys((429, 503), RateLimitError)
OVERRUN = "context.(length|window)|input.length|maximum.{1,40}token|too long"
ADVICE = {  # by the beginning of a status and message, or of an exception
    "3": " (a redirect: check the base URL)",
    "40[123]": " (check DEEPINFRA_TOKEN and the billing)",
    "404": " (check the model and the base URL)",
    f"(?is)(400|413|422|500).*({OVERRUN})": " (over 4,096 tokens: shorten it)",
    rf"gaierror\((?!{socket.EAI_AGAIN},)": " (is there such a host?)",
    "SSLCertVerificationError": " (SSL_CERT_FILE can name its authority)",
    "ModuleNotFoundError": " (https:// needs a Python with ssl)",
}


def find_advice(problem: str) -> str:
    """Return what to do about a problem; if there is advice, a retry does not help."""
    found = (advice for start, advice in ADVICE.items() if re.match(start, problem))
    return next(found, "")


def log_warning(message: str) -> None:
    import logging  # it takes 4 ms

    logging.getLogger("nemotron").warning("nemotron: %s", one_line(message))


def read_text(pieces: Iterable[bytes]) -> str:
    return b"".join(pieces).decode("utf-8-sig", "replace").strip()


class Exchange:
    """One call: it owns the deadline, the attempts, and what exceptions become."""

    def __init__(self, client: Client, body: JSON, retries: int = 2) -> None:
        self.client, self._payload = client, to_json(body).encode()
        self.deadline = client._clock() + (client.deadline or math.inf)
        self._retries = retries if client.retries is None else client.retries
        self._retried = 0

    def send(self, read: Callable[[Any], T]) -> T:
        delay = 0.0
        while True:
            self.status = self.request_id = self.body = None
            self._wait(delay)
            try:
                response = self.client._open(self._payload, self._read_timeout())
                self.status = response.status
                self.request_id = response.headers["x-request-id"]
                if self.status != 200:
                    raise self._status_error(response)
                return read(response)
            except Exception as cause:
                delay = self._delay_after(self.to_error(cause))

    def _delay_after(self, error: NemotronError) -> float:
        delay = error.retry_after
        if delay is None:
            delay = min(0.5 * 2**self._retried, 8) * random.uniform(0.75, 1)
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
            raise socket.timeout("the deadline has passed")
        return min(self.client.timeout, left)

    def pieces(self, response: Any) -> Iterator[bytes]:
        """Yield the body as it comes, up to MAX_BYTES since `received` was set to 0."""
        self.received = 0
        with response:
            if response.headers["Content-Encoding"] not in (None, "identity"):
                raise ReplyError("the reply is compressed")
            while response.fp and response.length != 0:
                # urllib has no other way to bound each read.
                response.fp.raw._sock.settimeout(self._read_timeout())
                piece = response.read1(65536)
                self.received += len(piece)
                if self.received > MAX_BYTES:
                    raise ReplyError(f"a reply or an event of over {MAX_BYTES} bytes")
                yield piece
            if response.length:  # a short body, of which read1 says nothing
                raise http.client.IncompleteRead(b"", response.length)

    def read_completion(self, response: Any) -> Completion:
        text = read_text(self.pieces(response))
        if not text:
            raise http.client.IncompleteRead(b"")
        reply = self.body = read_json(text)
        ChunkMerger().add(reply, text)  # raises for an error in it
        if not dig({}, reply, "choices", 0, "message"):
            raise ReplyError("the server sent no reply")
        return Completion(reply)

    def _status_error(self, response: Any) -> Any:
        with suppress(Exception):
            self.body = read_json(read_text(self.pieces(response)))
        message = server_message(self.body) or response.reason
        advice = find_advice(f"{self.status} {message[:2000]}")
        kind, url = STATUSES.get(self.status, APIStatusError), self.client._url
        error = kind(f"HTTP {self.status} from {url}{advice}: {message}")
        error.retryable = not advice and self.status in RETRIED
        with suppress(Exception):  # no such header, or an odd one
            value = response.headers["Retry-After"]
            date = email.utils.parsedate_tz(value)
            delay = email.utils.mktime_tz(date) - time.time() if date else float(value)
            error.retry_after = delay if delay >= 0 else None
        return error

    def to_error(self, cause: Any, kind: Any = APIConnectionError) -> Any:
        """Return the NemotronError for an exception, without the token."""
        error, redact = cause, self.client._redact
        if not isinstance(cause, NemotronError):
            if isinstance(getattr(cause, "reason", None), Exception):
                cause = cause.reason  # of a URLError
            if kind is APIConnectionError and isinstance(cause, socket.timeout):
                kind = APITimeoutError
            advice, url = find_advice(repr(cause)), self.client._url
            error = kind(f"no complete reply from {url}{advice}: {describe(cause)}")
            error.retryable = not advice
            error.__cause__, cause.__cause__, cause.__context__ = cause, None, None
            cause.args = redact(cause.args)
        error.args, error.status_code = redact(error.args), self.status
        error.partial = Completion()
        error.request_id, error.body = redact([self.request_id, self.body])
        return error


class Client:
    """The settings of calls.  Creating one does no I/O; threads may share it.

    token, base_url, model  None: DEEPINFRA_TOKEN, DEEPINFRA_BASE_URL, NEMOTRON_MODEL
    timeout   seconds of silence on the connection
    deadline  seconds for a whole call, with its retries and waits
    retries   None: 2, in a batch 6

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
        if token is None:
            tokens = (os.environ.get(name, "").strip() for name in TOKEN_NAMES)
            token = next(filter(None, tokens), "")
        require(isinstance(token, str), "token must be a string")  # and is not shown
        self.base_url = base_url or os.environ.get("DEEPINFRA_BASE_URL") or BASE_URL
        self.model = model or os.environ.get("NEMOTRON_MODEL") or MODEL
        self.timeout = 600.0 if timeout is None else timeout
        self.deadline, self.retries = deadline, retries
        for name, value in vars(self).items():
            if value is not None:
                check_value(name, value)
        match = re.fullmatch(URL, self.base_url)
        if not match or int(match["port"] or 1) not in range(1, 65536):
            raise InvalidRequestError("base_url must be https://..., or http: loopback")
        self._is_local = bool(match["loopback"])
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._token, self._lock = token.strip(), threading.Lock()
        forms = [rf"\\*(?:{re.escape(c)}|(?i:u{ord(c):04x}))" for c in self._token]
        self._token_pattern = re.compile(r"(?<!\\)" + "".join(forms))  # or escaped

    def chat(self, messages: Messages, **params: Unpack[Params]) -> Completion:
        """Return the whole reply.  Raises NemotronError."""
        exchange = Exchange(self, self._body(messages, params))
        return exchange.send(exchange.read_completion)

    def stream(self, messages: Messages, **params: Unpack[Params]) -> Stream:
        """Return the reply as it arrives.  Raises NemotronError."""
        body = {**self._body(messages, params), "stream": True}
        require(body.get("n", 1) == 1, "n over 1 is not for streams")
        exchange = Exchange(self, body)
        return exchange.send(lambda response: Stream(exchange, response))

    def batch(
        self, requests: Iterable[Any], jobs: int = 8, **params: Unpack[BatchParams]
    ) -> Iterator[JSON]:
        """Send many requests, `jobs` (1 to 200) at a time; yield their rows.

        requests  strings, bodies, objects with a prompt, or lines of a batch file
        output    a file to append the rows to; what has a row there without an error
                  is neither sent again nor yielded
        params    defaults for every request

        A row is {"id", "custom_id", "request", "response", "error"}.  Raises
        AuthenticationError for a refused token, and NemotronError if `output` cannot
        be written; all other errors are in the rows.
        """
        output = params.pop("output", None)
        return Batch(self, requests, jobs, output, params).rows(enumerate(requests, 1))

    def _body(self, messages: Any, params: Any) -> JSON:
        given = {"model": self.model, **check_parameters(params)}
        return build_request(messages, **given)

    def _redact(self, value: Any, depth: int = 0) -> Any:
        """Return JSON without the token, and not nested too deep to be read again."""
        redact = self._redact
        if depth > MAX_DEPTH:
            return "..."
        if isinstance(value, dict):
            return {redact(k): redact(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [redact(item, depth + 1) for item in value]
        if not isinstance(value, (str, bytes)) or len(self._token) < 8:
            return value  # a shorter token may be a word
        text = value if isinstance(value, str) else repr(value)
        return self._token_pattern.sub("[token]", text)

    def _headers(self) -> Any:
        if not re.fullmatch("[ -~]*" if self._is_local else "[ -~]+", self._token):
            raise AuthenticationError("set a valid DEEPINFRA_TOKEN, or try --offline")
        headers = {"Content-Type": "application/json", "User-Agent": "nemotron.py"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def _open(self, payload: bytes, timeout: float) -> Any:
        request = urllib.request.Request(self._url, payload, self._headers())
        with self._lock:  # so that the certificates are read once
            opener = self._opener
        return opener.open(request, timeout=timeout)

    @functools.cached_property
    def _opener(self) -> Any:
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
        self._merger = ChunkMerger()
        self._problem: Any = ConnectionError("the connection was closed")
        lines: Any = split_lines(exchange.pieces(response))
        kind = response.headers.get_content_type()
        if kind in ("application/json", "text/html"):  # one reply: make it an event
            data = (b"data:" + line.removeprefix(b"\xef\xbb\xbf") for line in lines)
            lines = itertools.chain(data, [b"", b"data:[DONE]"])
        self._events: Any = split_events(lines)

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; nothing more is read."""
        self._events.close()
        self._response.close()

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self._read() if text)

    def chunks(self) -> Iterator[Chunk]:
        """Yield every Chunk that is left, instead of the text."""
        return (Chunk(chunk) for chunk, _ in self._read())

    def completion(self) -> Completion:
        """Read the rest, and return the whole reply, with what was read before."""
        for _ in self._read():
            pass
        return self._merger.completion()

    def _read(self) -> Iterator[tuple[JSON, str]]:
        exchange, merger = self._exchange, self._merger
        try:
            for name, data in self._events:
                exchange.received = 0
                chunk = read_json(data)
                if data == "[DONE]":
                    self._problem = None if merger.choices else ReplyError("no reply")
                    break
                if name == "error":
                    chunk = {"error": chunk or "no message"}
                elif not chunk or data.startswith(":"):
                    continue  # it keeps the connection alive
                try:
                    text = merger.add(chunk, data)
                except ReplyError:
                    if merger.is_finished:
                        continue  # usage may still come
                    raise
                if merger.is_finished:  # min() keeps the end that is set first
                    end = exchange.client._clock() + GRACE
                    exchange.deadline = min(exchange.deadline, end)
                yield chunk, text
        except Exception as problem:
            self._problem = problem
        self.close()
        if self._problem and not merger.is_finished:
            error = exchange.to_error(self._problem, IncompleteReplyError)
            error.partial, self._problem = merger.completion(), error
            raise error


def chat(messages: Messages, **params: Unpack[Params]) -> Completion:
    """Call Client().chat()."""
    return Client().chat(messages, **params)


def stream(messages: Messages, **params: Unpack[Params]) -> Stream:
    """Call Client().stream()."""
    return Client().stream(messages, **params)


def batch(
    requests: Iterable[Any], jobs: int = 8, **params: Unpack[BatchParams]
) -> Iterator[JSON]:
    """Call Client().batch()."""
    return Client().batch(requests, jobs, **params)


# ----------------------------------- Batch

ROW_START = b'{"id": "batch_req_'  # how each row begins


def read_request(item: Any, defaults: JSON) -> JSON:
    """Return the body of a batch request; its own fields go before the defaults."""
    item = {"prompt": item} if isinstance(item, str) else item
    fields: Any = dig({}, item, "body") or item
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"not an object or a string: {reprlib.repr(item)}")
    extra = {**defaults.get("extra", {}), **fields}
    for name in ("custom_id", "stream", "stream_options"):
        extra.pop(name, None)
    messages = extra.pop("messages" if "messages" in fields else "prompt", None)
    own = {name: extra.pop(name) for name in REQUEST_NAMES[:-1] if name in fields}
    params = {**defaults, **check_parameters(own), "extra": extra}
    if is_list_of(dict, messages) and any(m.get("role") == "system" for m in messages):
        params["system"] = own.get("system")  # the default is for those without one
    return build_request(messages, **params)


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


def row_key(row: JSON) -> bytes:
    """Return a digest of a request, and of its name unless that is line-N."""
    import hashlib

    name = re.sub(r"^line-\d+$", "", str(row.get("custom_id")))
    text = json.dumps([name, row.get("request")], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def open_output(
    path: Any, source: Any
) -> tuple[Any, collections.Counter[bytes | None]]:
    """Return the file to append rows to, and how often each key is answered in it."""
    answered: collections.Counter[bytes | None] = collections.Counter()
    if path is None:
        return None, answered
    check_value("output", path)
    with reporting(path), contextlib.ExitStack() as stack:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("not a regular file")
        file = stack.enter_context(open(path, "a+b"))
        with suppress(AttributeError, OSError, TypeError):
            if os.path.sameopenfile(source.fileno(), file.fileno()):
                raise ValueError("it is the input, too")
        lock_file(file, wait=False)
        end = file.seek(0)
        for number, line in enumerate(file, 1):
            row, is_whole = read_json(line.decode()), line.endswith(b"\n")
            if is_whole and {"response", "error"} <= dig({}, row).keys():
                answered[row_key(row)] += row["error"] is None
            elif is_whole or not ROW_START.startswith(line[: len(ROW_START)]):
                raise ValueError(f"line {number} is not a row")
            else:  # it is torn
                file.truncate(end)
            end += len(line)
        stack.pop_all()
        return file, answered


def row_error(error: Exception, code: str) -> JSON:
    return {"code": getattr(error, "code", code), "message": one_line(describe(error))}


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
        self.client, self._jobs, self.skipped = client, jobs, 0
        self._params = {"model": client.model, **check_parameters(params)}
        self._names: set[str] = set()
        self._slots: Any = queue.SimpleQueue()  # one is free once its row is used
        self._rows: Any = queue.SimpleQueue()
        self._source_lock, self._taken = threading.Lock(), 0
        self.lock = threading.RLock()  # garbage collection may end a batch anywhere
        self._has_ended, self._failure = False, None
        self.stopped = threading.Event()
        self.not_before, self.next_pause = -math.inf, self.FIRST_PAUSE
        self._output, self._answered = open_output(output, source)

    def rows(self, numbered: Any, parse: Any = lambda item: item) -> Iterator[JSON]:
        """Yield the rows as they come; then raise what has ended the batch early."""
        work = functools.partial(self._work, self._prepare(numbered, parse))
        received = 0
        try:
            for started in range(self._jobs):
                self._slots.put("free")
                try:
                    threading.Thread(target=work, daemon=True).start()
                except (RuntimeError, MemoryError):  # the system allows no more
                    if not started:
                        raise
                    break
            while not self._has_ended or received < self._taken:
                try:
                    row = self._rows.get()
                except KeyboardInterrupt as error:  # what is complete still comes
                    self.end(error, at_once=True)
                    continue
                if row is None:
                    break
                if row:
                    received += 1
                    yield row
                    self._slots.put("free")
        finally:
            self.end(at_once=True)
            with self.lock, suppress(OSError):
                if self._output:
                    self._output.close()
        if self._failure:
            raise self._failure

    def end(self, failure: Any = None, at_once: bool = False) -> None:
        """Take no more requests; at once: drop those in flight, too."""
        self._has_ended, self._failure = True, self._failure or failure
        if at_once:
            self.stopped.set()
        self._rows.put(None if at_once else {})  # {} only wakes up rows()
        self._slots.put("free")  # wakes up a worker, which wakes up the next

    def _work(self, requests: Any) -> None:
        try:
            while self._slots.get() and not self._has_ended:
                with self._source_lock:
                    row, body = next(requests)
                    if self._has_ended:
                        break
                    self._taken += 1
                self._answer(row, body)
        except BaseException as error:
            self.end(None if isinstance(error, StopIteration) else error)
        self._slots.put("free")

    def _prepare(self, numbered: Any, parse: Any) -> Iterator[tuple[JSON, Any]]:
        """Yield the row and the body, None if invalid, of each request to answer."""
        for number, item in numbered:
            row: JSON = {"id": f"batch_req_{os.urandom(12).hex()}"}
            row.update(custom_id=f"line-{number}", request=None)
            row.update(response=None, error=None)
            body = None
            try:
                item = parse(item)
                name: Any = dig(None, item, "custom_id")
                if not isinstance(name, (str, type(None))):
                    raise InvalidRequestError("custom_id must be a string")
                row["custom_id"] = name = row["custom_id"] if name is None else name
                if name in self._names:
                    row["error"] = {"code": "duplicate_custom_id", "message": name}
                else:
                    self._names.add(name)
                    body = json.loads(to_json(read_request(item, self._params)))
                    row["request"] = self.client._redact(body)
            except Exception as error:
                row["error"] = row_error(error, "invalid_request")
            key = row_key(row) if body and self._answered else None
            if self._answered[key] > 0:
                self._answered[key] -= 1
                self.skipped += 1
            else:
                yield row, body

    def _answer(self, row: JSON, body: Any) -> None:
        try:
            if body:
                self._send(row, body)
            row = self.client._redact(row)
            with self.lock:
                if self._output and not self.stopped.is_set():
                    with reporting(self._output.name, NemotronError):
                        self._output.write(json.dumps(row).encode() + b"\n")
                        self._output.flush()
            self._rows.put(row)
        except BaseException as error:  # the output is full, or no memory is left
            self.end(error, at_once=True)

    def _send(self, row: JSON, body: JSON) -> None:
        exchange = BatchExchange(self, body)
        try:
            exchange.send(exchange.read_completion)
            self.next_pause = self.FIRST_PAUSE
        except Exception as error:
            row["error"] = row_error(error, "reply")
            if isinstance(error, AuthenticationError):
                self.end(error)
        if exchange.status:
            row["response"] = {"status_code": exchange.status}
            row["response"].update(request_id=exchange.request_id, body=exchange.body)


class BatchExchange(Exchange):
    """A call of a batch, whose calls share the pauses that a busy server needs."""

    def __init__(self, batch: Batch, body: JSON) -> None:
        super().__init__(batch.client, body, 6)
        self._batch, self._paused = batch, 0.0

    def _wait(self, seconds: float) -> None:
        clock, batch = self.client._clock, self._batch
        until = clock() + seconds
        while (left := min(max(until, batch.not_before), self.deadline) - clock()) > 0:
            if batch.stopped.wait(left):
                raise NemotronError("the batch was stopped")
        self._last_pause = batch.not_before

    def _delay_after(self, error: NemotronError) -> float:
        """Pause all calls when the server is busy; this uses up no retry."""
        batch, now, timeout = self._batch, self.client._clock(), self.client.timeout
        if getattr(error.__cause__, "errno", 0) in (errno.EMFILE, errno.ENFILE):
            return 0.1  # another call may have closed its files by then
        if not isinstance(error, RateLimitError):
            return super()._delay_after(error)
        delay = error.retry_after or 0.0
        if self._paused >= timeout or delay > min(timeout, self.deadline - now):
            raise error
        with batch.lock:
            # The first call of those sent before it begins a pause.
            if self._last_pause == batch.not_before:
                if not delay:
                    delay = batch.next_pause
                    batch.next_pause = min(2 * delay, batch.MAX_PAUSE)
                log_warning(f"all workers pause for {delay:.1f} s: {error}")
            batch.not_before = max(batch.not_before, now + delay)
            self._paused += batch.not_before - now
        return 0.0


# -------------------------- Offline server


@contextlib.contextmanager
def offline(**settings: Any) -> Iterator[Client]:
    """A Client for a server in this process, which echoes the last user message."""
    import socketserver

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError, ValueError):  # the client has gone
                self.rfile.readline()
                size = http.client.parse_headers(self.rfile)["Content-Length"] or 0
                body = self.rfile.read(int(size)).decode("utf-8", "replace")
                kind, answer = echo(read_json(body))
                head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close"
                self.wfile.write(f"{head}\r\n\r\n{answer}".encode("ascii"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.socket.listen(1024)  # connections at once
        serve = functools.partial(server.serve_forever, 0.01)  # seconds to shut down
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1/openai"
        try:
            yield Client(**{**settings, "token": "", "base_url": url})
        finally:
            server.shutdown()


def echo(request: Any) -> tuple[str, str]:
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


# ------------------- Command line: options

USAGE = "nemotron.py [options] [PROMPT ...]"
HELP_END = """\
examples:
  %(prog)s 'Name two techniques to cook lamb.'
  git diff | %(prog)s 'Write a commit message.'
  %(prog)s --batch topics.txt --output rows.jsonl 'Ask about {}.'

exit status:
  0    complete
  1    failed; a batch has error rows
  2    usage error
  3    not complete; --max-cost reached
  4    DEEPINFRA_TOKEN is missing or refused
  5    server busy
  130  Ctrl-C
  141  output closed"""
OPTIONS = read_table("""\
request | -s --system | TEXT | system message
request | -m --model | ID | default: NEMOTRON_MODEL
request | -o --option | KEY VALUE | any field: JSON, @FILE or text
request | -n --no-stdin | | leave standard input alone
request | --no-stream | | wait for the whole reply
request | -u --usage | | show tokens, cost and seconds
prompt | -c --conversation | PATH | continue a conversation
prompt | -i --interactive | | chat, a turn a line, until exit
prompt | --json | | print the server's JSON
prompt | --dry-run | | print the request, send nothing
batch | --batch | FILE | send each line (-: of standard input)
batch | --output | FILE | append rows; skip what has one there
batch | -j --jobs | an integer | at a time, 1 to 200; default: 8
batch | --max-cost | a number | stop at so many US dollars
server | --base-url | URL | default: DEEPINFRA_BASE_URL
server | --timeout | a number | seconds of silence; default: 600
server | --deadline | a number | seconds for a whole call
server | --retries | an integer | default: 2, in a batch 6
server | --offline | | echo the prompt, without a network""")


def parse_options(argv: list[str]) -> Any:
    import argparse

    def fail(message: str) -> Any:
        raise InvalidRequestError(f"{message} (see -h)")

    parser: Any = argparse.ArgumentParser(usage=USAGE, allow_abbrev=False)
    parser.error, parser.epilog = fail, HELP_END
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
        for name, kind, limits, _, text in PARAMETERS[:-3]  # those need -o
    ]
    groups = {row[0]: parser.add_argument_group(row[0]) for row in rows}
    for title, flags, kind, text in rows:
        settings = kinds.get(kind, {"metavar": kind if kind.isupper() else "TEXT"})
        groups[title].add_argument(*flags.split(), help=text, **settings)
    argv = [os.fsencode(arg).decode("utf-8", "surrogateescape") for arg in argv]
    end = [*argv, "--"].index("--")  # after it, all are words
    args = parser.parse_intermixed_args(argv[:end])
    args.words += argv[end + 1 :]
    args.stream = not (args.json or args.no_stream or args.batch)
    return args


def read_params(args: Any) -> JSON:
    excluded = "batch" if args.batch is None else "prompt"
    for title, flags, *_ in OPTIONS:
        name = flags.split("--")[1].replace("-", "_")
        if title == excluded and getattr(args, name) is not None:
            raise InvalidRequestError(f"{flags} is only for a {title}")
    extra: JSON = {}
    if args.usage and args.stream:
        extra["stream_options"] = {"include_usage": True}
    for key, value in args.option or ():
        extra[key] = read_json(read_file(value[1:]) if value[:1] == "@" else value)
    if extra.get("n", 1) != 1 and not (args.json or args.batch or args.dry_run):
        raise InvalidRequestError("n over 1 needs --json or --batch")
    params = {name: getattr(args, name, None) for name in REQUEST_NAMES}
    return check_parameters({**params, "extra": extra})


# ---- Command line: one reply and conversations


def warn(message: object) -> None:
    with suppress(OSError, ValueError):  # it may be full or closed
        print("nemotron:", one_line(str(message)), file=sys.stderr)


def write_reply(pieces: Iterable[str]) -> None:
    """Write a reply: no white space before it, and one newline after it."""
    show = escape_controls if sys.stdout.isatty() else str
    begun, held = False, ""  # held: newlines, which may be the last
    try:
        for piece in pieces:
            held += piece if begun else piece.lstrip()
            line = held.rstrip("\r\n")
            begun, held = begun or bool(line), held[len(line) :]
            print(show(line), end="", flush=True)
        begun = True  # an empty reply is an empty line
    finally:
        if begun:
            print()


def open_input(path: str) -> Any:
    if path != "-":
        return open(path, "rb")
    if sys.platform != "win32" and not select.select([sys.stdin], [], [], 2)[0]:
        warn("waiting for standard input (or use -n)")
    # A thread may hold the lock of sys.stdin at the end.
    return open(sys.stdin.fileno(), "rb", closefd=False)


def read_file(path: str) -> str:
    with reporting(path), open_input(path) as file:
        return str(file.read(), "utf-8-sig").rstrip("\r\n")


def read_prompt(args: Any) -> str:
    """Return the words, with standard input after them or in place of "-"."""
    words = args.words
    if args.no_stdin or ("-" not in words and sys.stdin.isatty()):
        return " ".join(words)
    place = [*words, "-"].index("-")
    parts = " ".join(words[:place]), read_file("-"), " ".join(words[place + 1 :])
    return "\n\n".join(filter(None, parts))


def load_conversation(path: str) -> Any:
    with reporting(path):
        tempfile.TemporaryFile(dir=os.path.dirname(path)).close()  # or it is too late
        if not os.path.exists(path):
            return None
        with open(path, "rb+") as file:  # "+" refuses a pipe
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
            raise ValueError("it was changed meanwhile")
        temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        with tempfile.NamedTemporaryFile("w", dir=temporary, delete=False) as file:
            json.dump(after, file, indent=1)
        with suppress(OSError):  # a new file is 0600
            shutil.copymode(path, file.name)
        os.replace(file.name, path)


def finish_problem(reply: Completion) -> str:
    choices: list[Any] = dig([], reply, "choices")
    reasons = {dig("", choice, "finish_reason") for choice in choices}
    return ", ".join(reasons.intersection(INCOMPLETE))


def format_cost(cost: float | None) -> str:
    if cost is None or math.isnan(cost):
        return "cost unknown"
    return f"${cost:.8f}".rstrip("0").rstrip(".")


def send_turn(args: Any, saved: Any, prompt: str) -> Any:
    """Send one more prompt; return all messages, and the exit status."""
    client, system, began = args.client, args.system, time.monotonic()
    turns = [m for m in saved or () if system is None or m["role"] != "system"]
    if prompt:
        turns.append({"role": "user", "content": prompt})
    require(turns, f"no prompt: {USAGE}")
    body = build_request(turns, stream=args.stream, **args.params)
    if args.dry_run:
        print(to_json(body))
        return saved, 0
    if args.stream:
        with client.stream(turns, **args.params) as stream:
            write_reply(stream)
            reply = stream.completion()
    else:
        reply = client.chat(turns, **args.params)
        write_reply([json.dumps(reply) if args.json else reply.text])
    problem = finish_problem(reply)
    if problem:
        warn(f"the reply is not complete: finish_reason {problem}")
    if args.usage:
        get, model = reply.usage.get, dig(client.model, reply, "model")
        line = f"{get('prompt_tokens', '?')} + {get('completion_tokens', '?')} tokens"
        line += f", {format_cost(reply.cost)}, {time.monotonic() - began:.1f} s"
        line += f", model {model}" if model != client.model else ""
        warn(client._redact(line))
    messages = [*body["messages"], reply.message]
    if args.conversation:
        save_conversation(args.conversation, saved, messages)
    return messages, 3 if problem else 0


def converse(args: Any) -> int:
    saved = load_conversation(args.conversation) if args.conversation else None
    if args.no_stdin or args.dry_run or not args.interactive:
        return int(send_turn(args, saved, read_prompt(args))[1])
    args.client._headers()  # without a token, no turn succeeds
    words, prompt = " ".join(args.words), ""
    if sys.stdin.isatty():
        prompt = "> "
        warn("exit or Ctrl-D ends the chat, Ctrl-C drops a turn")
        with suppress(ImportError):
            __import__("readline").parse_and_bind("set enable-bracketed-paste on")
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr
    with suppress(EOFError):
        while True:
            try:
                with contextlib.redirect_stdout(screen):
                    text, words = (words or input(prompt)).lstrip("\ufeff").strip(), ""
                if text == "exit":
                    break
                if text:
                    saved, _ = send_turn(args, saved, text)
            except (NemotronError, KeyboardInterrupt) as error:
                warn(str(error) or "stopped, this turn is dropped")
    return 0


# ---- Command line: batches, and the start


def draw(text: str) -> None:
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


class Progress:
    def __init__(self, batch: Batch, total: int, max_cost: Any) -> None:
        self.batch, self.total, self.max_cost = batch, total, max_cost
        self.began, self.cost, self.done, self.in_a_row = time.monotonic(), 0.0, 0, 0
        self.counts = collections.Counter(failed=0)  # and each code

    def add(self, row: JSON) -> None:
        error, reply = row["error"], Completion(dig({}, row, "response", "body"))
        self.done += 1
        if error:
            if not self.counts["failed"]:
                draw("")
                warn(f"first failure, {row['custom_id']}: {error['message']}")
            self.counts.update(["failed", error["code"]])
            self.in_a_row += row["request"] is not None
        else:
            if finish_problem(reply):
                self.counts["not complete"] += 1
            cost, self.in_a_row = reply.cost, 0
            self.cost += math.nan if cost is None or cost < 0 else cost
        if self.in_a_row >= 20:
            self.batch.end(NemotronError("stopped by 20 failures in a row"))

    def allows(self, line: bytes) -> bool:
        is_over = self.max_cost is not None and not self.cost < self.max_cost
        if line.strip() and is_over:
            self.batch.end(IncompleteReplyError("--max-cost reached or cost unknown"))
        return bool(line.strip()) and not is_over

    def summary(self) -> str:
        seconds = time.monotonic() - self.began or 0.001
        rate, done = self.done / seconds, self.done + self.batch.skipped
        parts = [f"{done} of {self.total or '?'} done"]
        parts += [f"{count} {name}" for name, count in self.counts.items()]
        parts += [f"{rate:.1f}/s, {format_cost(self.cost)}, {seconds:.1f} s"]
        if rate and self.total > done:
            parts.append(f"{(self.total - done) / rate:.0f} s left")
        return ", ".join(parts)


def run_batch(args: Any) -> int:
    check_value("max_cost", args.max_cost or 0)
    template = " ".join(args.words) or "{}"
    if "{}" not in template:
        template += "\n\n{}"
    with reporting(args.batch):
        file, total = open_input(args.batch), 0
        if os.path.isfile(args.batch):
            total = sum(1 for line in file if line.strip())
            file.seek(0)
    jobs = 8 if args.jobs is None else args.jobs
    batch = Batch(args.client, file, jobs, args.output, args.params)
    progress = Progress(batch, total, args.max_cost)
    lines = (pair for pair in enumerate(file, 1) if progress.allows(pair[1]))
    status = 0

    def parse(line: bytes) -> Any:
        text = line.decode("utf-8-sig").strip()
        item = json.loads(text) if text.startswith(("{", "[", '"')) else text
        return template.replace("{}", item) if isinstance(item, str) else item

    try:
        for row in batch.rows(lines, parse):
            try:
                if args.output is None:
                    sys.stdout.write(json.dumps(row) + "\n")
                progress.add(row)
                draw(progress.summary())
            except KeyboardInterrupt as error:  # the rows that are complete still come
                batch.end(error, at_once=True)
    except NemotronError as error:
        draw("")
        warn(error)
        status = error.exit_status
    finally:
        draw("")
        warn(progress.summary())
        if args.batch != "-":
            file.close()
    if progress.counts["failed"] and status != 4:
        return 1
    return status or (3 if progress.counts["not complete"] else 0)


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    sys.stdin = sys.stdin or open(os.devnull)  # where it is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        require(sys.stdout, "standard output is closed")
        files: Any = (sys.stdin, sys.stdout, sys.stderr)
        for file in files:
            file.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
        with suppress(SystemExit):  # of -h and --version
            args = parse_options(sys.argv[1:] if argv is None else argv)
            args.params = read_params(args)
            names = ("model", "base_url", "timeout", "deadline", "retries")
            settings = {name: getattr(args, name) for name in names}
            server: Any = offline(**settings) if args.offline else None
            with server or contextlib.nullcontext(Client(**settings)) as args.client:
                args.params["model"] = args.client.model
                return converse(args) if args.batch is None else run_batch(args)
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt:
        return 130
    except NemotronError as error:
        warn(error)
        return error.exit_status
    except Exception as error:
        sys.stdout = open(os.devnull, "w")  # or exiting fails again
        closed = errno.EPIPE if sys.platform != "win32" else errno.EINVAL
        if getattr(error, "errno", 0) == closed:
            return 141
        name = "standard output" if isinstance(error, OSError) else type(error).__name__
        warn(f"{name}: {describe(error)}")
        return 1


if __name__ == "__main__":
    os._exit(main())  # tearing Python down takes time
