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

A reply arrives whole, or it is an error.
"""

from __future__ import annotations

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
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress

TYPE_CHECKING = False  # typing takes 2 ms
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
__all__ += ["APIStatusError", "AuthenticationError", "RateLimitError"]
__all__ += ["ReplyError", "IncompleteReplyError"]

MODEL = "nvidia/Nemotron-4-340B-Instruct"
BASE_URL = "https://api.deepinfra.com/v1/openai"
MAX_BYTES = 64 << 20  # of a reply, or of one event
MAX_DEPTH = 100  # levels of JSON that any Python can read
MAX_DELAY = 120.0  # seconds; no retry if a server asks for more
GRACE = 5.0  # seconds to read on after a stream's end

# ---- Errors

CONTROLS = "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"


def escape_controls(text: str) -> str:
    return re.sub(CONTROLS, lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    line = escape_controls(" ".join(text[:1000].split()))
    return line if len(line) <= 280 else line[:277] + "..."


def describe(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class NemotronError(Exception):
    """Base class; str() is one line of at most 280 characters."""

    code, exit_status = "error", 1  # in a batch row; of the command line
    retryable = False  # the same request may succeed later
    status_code: int | None = None
    request_id: str | None = None
    retry_after: float | None = None  # seconds
    body: Any = None  # of the response: JSON, or text
    partial: Completion  # what was received

    def __init_subclass__(cls, code: str = "", exits: int = 0) -> None:
        cls.code, cls.exit_status = code or cls.code, exits or cls.exit_status

    def __str__(self) -> str:
        return one_line(super().__str__())


class InvalidRequestError(NemotronError, ValueError, code="invalid_request", exits=2):
    """The caller's mistake; nothing was sent."""


class APIConnectionError(NemotronError, code="connection"):
    """No usable connection to the server."""


class APITimeoutError(APIConnectionError, TimeoutError, code="timeout"):
    """`timeout` or `deadline` has passed (in a stream: before its status 200)."""


class APIStatusError(NemotronError, code="api_status"):
    """The server answered with a status other than 200."""


class AuthenticationError(APIStatusError, code="authentication", exits=4):
    """Status 401, 402, 403; or no usable token (status_code is None)."""


class RateLimitError(APIStatusError, code="rate_limit", exits=5):
    """Status 429 or 503: the server is busy."""


class ReplyError(NemotronError, code="reply"):
    """Status 200, but not an answer."""


class IncompleteReplyError(ReplyError, code="incomplete_reply", exits=3):
    """The stream stopped before the reply ended."""


# ---- Parameters


def require(condition: Any, problem: str) -> None:
    if not condition:
        raise InvalidRequestError(problem)


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def read_table(text: str) -> Any:
    return [[cell.strip() for cell in row.split("|")] for row in text.splitlines()]


KINDS: Any = {
    "a number": lambda x: isinstance(x, (int, float)),
    "an integer": lambda x: isinstance(x, int),
    "a string": lambda x: isinstance(x, str),
    "a path": lambda x: isinstance(x, (str, os.PathLike)),
    "none or auto": lambda x: x in ("none", "auto"),
    "1 to 16 strings": lambda x: (
        isinstance(x, str) or is_list_of(str, x) and 0 < len(x) <= 16
    ),
    "a list of objects": lambda x: is_list_of(dict, x),
    "an object": lambda x: isinstance(x, dict),
}
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
stop | 1 to 16 strings | | | end the reply before this text
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
stream | | | is chosen by calling stream()""")
SPECS = {name: row for row in PARAMETERS + SETTINGS for name in row[0].split()}
REQUEST_NAMES = [row[0] for row in PARAMETERS] + ["model", "system", "extra"]


def check_value(name: str, value: Any) -> None:
    kind, limits = SPECS[name][1:3]
    valid = KINDS[kind](value) and not isinstance(value, bool)
    if valid and limits:
        low, sign, _, _, high = limits.split()
        valid = float(low) <= value <= int(high) and (sign != "<" or value > float(low))
    valid = valid or value is None
    require(valid, f"{name}: got {reprlib.repr(value)}, must be {kind} {limits}")


def check_parameters(values: Any) -> JSON:
    """Return the values that are not None."""
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        if name not in REQUEST_NAMES:
            import difflib

            near = difflib.get_close_matches(name, REQUEST_NAMES, 1, 0.0)[0]
            unknown = f"unknown; did you mean {near}? Other fields go into extra"
            raise InvalidRequestError(f"{name:.80}: {SPECS.get(name, [unknown])[-1]}")
        check_value(name, value)
    reserved = {"messages", "model", "stream"} & given.get("extra", {}).keys()
    require(not reserved, f"extra must be without {reserved}")
    return given


# ---- Request

ROLES = ("system", "user", "assistant", "tool")
raw_decode = json.JSONDecoder().raw_decode  # faster than json.loads()


def dig(default: T, value: Any, *path: Any) -> T:
    """Return value[path[0]]..., or default if absent or of another type."""
    try:
        for key in path:
            value = value[key]
    except (LookupError, TypeError):
        return default
    return value if default is None or isinstance(value, type(default)) else default


def read_json(text: str) -> Any:
    """Return the value, or the text itself if it is not JSON."""
    try:
        value, end = raw_decode(text.strip())
    except (ValueError, RecursionError):
        return text
    return value if end == len(text.strip()) else text


def to_json(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"not JSON: {error}") from None


def check_messages(messages: Any, systems: int = 0) -> Any:
    require(isinstance(messages, (list, tuple)), "messages must be a list")
    for index, message in enumerate(messages):
        where, role = f"messages[{index}]:", dig("", message, "role")
        require(role in ROLES, f"{where} role must be one of {ROLES}")
        systems += role == "system"
        require(systems < 2, f"{where} a second system message")
        content = message.get("content")
        is_valid = isinstance(content, str) or content and is_list_of(dict, content)
        if content is None and role == "assistant":
            is_valid = message.get("tool_calls")
        require(is_valid, f"{where} content must be a string or a list of objects")
        if role == "tool":
            require(dig("", message, "tool_call_id"), f"{where} no tool_call_id")
    return [dict(message) for message in messages]


def build_request(
    messages: Messages, *, stream: bool = False, **params: Unpack[Params]
) -> JSON:
    """Return the JSON body of a request.  Raises InvalidRequestError.

    messages  a string (one user message) or a list of message objects
    params    model, and the names in PARAMETERS; None: not sent
    system    a system message to put in front
    extra     other fields, not checked
    """
    given = check_parameters(params)
    fields, system = given.pop("extra", {}), given.pop("system", None)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    first = [] if system is None else [{"role": "system", "content": system}]
    checked = check_messages(messages, len(first))
    turns = [(i, m["role"]) for i, m in enumerate(checked) if m["role"] != "system"]
    last, role = turns[-1] if turns else (0, "")
    require(role in ("user", "tool"), f"messages[{last}]: last must be user or tool")
    body = {"model": MODEL, "messages": first + checked, **given, **fields}
    return {**body, "stream": True} if stream else body


# ---- Reply

STOP_TOKEN = "</s>"  # the model's last piece of text
INCOMPLETE = ("length", "content_filter", "abort", "error")  # finish_reason
RUNNING_TEXT = ("content", "reasoning_content", "reasoning", "refusal", "arguments")


class Completion(dict[str, "Any"]):
    """The server's JSON.  The properties are those of choice 0, and never raise."""

    def _dig(self, default: T, *path: Any) -> T:
        choices: Any = dig([], self, "choices")
        zero = next((c for c in choices if not dig(None, c, "index")), None)
        return dig(default, zero, *path)

    @property
    def text(self) -> str:
        """The text, or ""."""
        return self._dig("", "message", "content") or self._dig("", "delta", "content")

    @property
    def finish_reason(self) -> str | None:
        """Such as "stop", or "length" if cut off; None if unfinished."""
        return self._dig("", "finish_reason") or None

    @property
    def usage(self) -> JSON:
        """prompt_tokens, completion_tokens ...; {} if unknown."""
        return dig({}, self, "usage")

    @property
    def cost(self) -> float | None:
        """US dollars: `usage.estimated_cost`, else `usage.cost`; None if unknown."""
        costs: Any = map(self.usage.get, ("estimated_cost", "cost"))
        known = (c for c in costs if type(c) in (int, float) and 0 <= c < 1e9)
        return next(known, None)

    @property
    def tool_calls(self) -> list[JSON]:
        """[] if there are none."""
        calls: list[JSON] = self._dig([], "message", "tool_calls")
        return calls if is_list_of(dict, calls) else []

    @property
    def message(self) -> JSON:
        """The assistant's message, for the next request."""
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
    text = dig("", answer)
    return "" if text.lstrip()[:1] == "<" else text  # HTML


class ChunkMerger:
    def __init__(self) -> None:
        self.choices: Any = {}  # by index
        self.finished = False  # every choice that came has a finish_reason
        self._reply: JSON = {}  # without the choices
        self._parts: Any = []  # (object, key, value) of texts and lists
        self._held = ""  # a stop token, which is text if more follows
        self._plain: Any = None  # the last chunk, if it has only text

    def add(self, chunk: Any, source: str) -> Any:
        """Return the text that a chunk adds to choice 0.  Raises ReplyError."""
        try:  # most chunks differ from the last in their text only
            choices = chunk.get("choices") or [{}]
            text = (choices[0].get("delta") or {}).get("content")
            if self._plain and text and text != STOP_TOKEN:
                self._plain["choices"][0]["delta"]["content"] = text
                if chunk == self._plain:
                    self.choices[0]["message"]["content"].write(text)
                    return text
            return self._add(chunk)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
            said = server_message(source) or "no reply"
            raise ReplyError(f"the server sent an odd chunk: {said}") from None

    def _add(self, chunk: Any) -> Any:
        choices = [] if self.finished else chunk.get("choices") or []
        errors = [part for part in (chunk, *choices) if part.get("error")]
        said = server_message(errors if choices else chunk)
        if errors or said:
            if self.finished:
                return ""  # usage may still come
            raise ReplyError(f"the server sent an error: {said or 'no message'}")
        self._merge(self._reply, {**chunk, "choices": None})
        self._plain, new_text, delta = None, "", {}
        for choice in choices:
            index = int.__index__(choice.get("index") or 0)  # raises for 0.5
            delta = dict(choice.get("delta") or choice.get("message") or {})
            piece = delta.get("content")
            if index == 0 and piece not in (None, ""):
                text = self._held + piece
                self._held = piece if piece == STOP_TOKEN else ""
                delta["content"] = text.removesuffix(self._held)
                new_text += delta["content"]
            start = {"index": index, "message": {"role": "assistant", "content": None}}
            fields = {**choice, "message": delta}
            fields.pop("delta", None)
            self._merge(self.choices.setdefault(index, start), fields)
        reasons = [choice.get("finish_reason") for choice in self.choices.values()]
        self.finished = bool(reasons) and all(reasons)
        is_plain = new_text and delta.keys() <= {"role", "content"}
        if is_plain and not (self._held or self.finished):
            plain = {**dict.fromkeys(choices[0]), "index": 0, "delta": delta}
            self._plain = {**chunk, "choices": [plain]}
        return new_text

    def _merge(self, target: Any, source: Any) -> None:
        for key, value in source.items():
            old = target.get(key)
            if value in (None, ""):
                target[key] = value if old is None else old
            elif isinstance(value, dict):
                old = target[key] = old or {}
                self._merge(old, value)
            elif isinstance(value, list):
                if not old:
                    old = target[key] = {}  # items by index, until completion()
                    self._parts.append((target, key, old))
                for item in value:
                    index = dig(None, item, "index")
                    if index is None:
                        old[object()] = item
                    else:
                        fields = {k: v for k, v in item.items() if k != "index"}
                        self._merge(old, {index: fields})
            elif isinstance(value, str) and key in RUNNING_TEXT:
                if not old:  # a list of pieces would be ten times as large
                    old = target[key] = io.StringIO()
                    self._parts.append((target, key, old))
                old.write(value)
            else:
                target[key] = value

    def completion(self) -> Completion:
        for target, key, part in self._parts:
            is_list = isinstance(part, dict)
            target[key] = list(part.values()) if is_list else part.getvalue()
        self._reply.update(object="chat.completion", choices=[*self.choices.values()])
        return Completion(self._reply)


# ---- Server-sent events


def split_lines(pieces: Any) -> Any:
    """Yield the lines, which end with LF, CRLF or CR."""
    rest, after_cr = bytearray(), False
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


def split_events(lines: Any) -> Any:
    """Yield (name, data) of each event; the last may lack its empty line."""
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
    if name == "error" or data == "[DONE]" or not isinstance(read_json(data), str):
        yield name, data


# ---- Client

LOOPBACK = r"localhost|\[::1]|127(\.(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)){3}"
HOST = rf"https?://(?P<loopback>{LOOPBACK})|https://([\w.-]+|\[[0-9a-f:.]+])"
URL = rf"(?ai)({HOST})(:(?P<port>\d{{1,5}}))?(/[^?#\s]*)?"
TOKEN_NAMES = ("DEEPINFRA_TOKEN", "DEEPINFRA_API_KEY", "DEEPINFRA_API_TOKEN")
RETRIED = (408, 409, 429, 500, 502, 503, 504)
STATUSES: Any = dict.fromkeys((401, 402, 403), AuthenticationError)
STATUSES |= dict.fromkeys((429, 503), RateLimitError)
OVERRUN = "context.(length|window)|input.length|maximum.{1,40}token|prompt.*too long"
ADVICE = {  # by a status and message, or an exception
    "3": " (a redirect: check the base URL)",
    "40[123]": " (check DEEPINFRA_TOKEN and billing)",
    "404": " (check the model and the base URL)",
    f"(?is)(400|413|422|500).*({OVERRUN})": " (over 4,096 tokens: shorten it)",
    rf"gaierror\((?!{socket.EAI_AGAIN},)": " (is there such a host?)",
    "SSLCertVerificationError": " (SSL_CERT_FILE can name its authority)",
    "ModuleNotFoundError": " (https:// needs a Python with ssl)",
}


def find_advice(problem: str) -> str:
    """Return what helps where a retry does not; or ""."""
    return next((a for start, a in ADVICE.items() if re.match(start, problem)), "")


def log_warning(message: str) -> None:
    import logging  # 4 ms

    logging.getLogger("nemotron").warning("nemotron: %s", one_line(message))


def read_text(pieces: Any) -> str:
    return b"".join(pieces).decode("utf-8-sig", "replace").strip()


class Exchange:
    """One call: its deadline, attempts and errors."""

    def __init__(self, client: Client, body: JSON, batch: Any = None) -> None:
        self.client, self.batch, self._payload = client, batch, to_json(body).encode()
        self.deadline = client._clock() + (client.deadline or math.inf)
        default = 6 if batch else 2
        self._retries = default if client.retries is None else client.retries
        self._retried, self._paused, self.ended = 0, 0.0, False

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
        now = self.client._clock()
        if self.ended:  # min() keeps the end that was set first
            self.deadline = min(self.deadline, now + GRACE)
        left = self.deadline - now
        if left <= 0:
            raise socket.timeout("the deadline has passed")
        return min(self.client.timeout, left)

    def pieces(self, response: Any) -> Any:
        """Yield the body; `received`, which Stream resets, ends at MAX_BYTES."""
        self.received = 0
        with response:
            if response.headers["Content-Encoding"] not in (None, "identity"):
                raise ReplyError("the reply is compressed")
            while response.fp and response.length != 0:
                if self.ended or self.deadline < math.inf:
                    # The one way to bound a read of urllib.
                    response.fp.raw._sock.settimeout(self._read_timeout())
                piece = response.read1(65536)
                self.received += len(piece)
                if self.received > MAX_BYTES:
                    raise ReplyError(f"a reply or event over {MAX_BYTES} bytes")
                yield piece
            if response.length:  # read1 does not raise
                raise ConnectionError("the body was cut short")

    def read_completion(self, response: Any) -> Completion:
        text = read_text(self.pieces(response))
        if not text:
            raise ConnectionError("an empty reply")
        reply = self.body = read_json(text)
        ChunkMerger().add(reply, text)  # raises for an error in it
        if not dig({}, reply, "choices", 0, "message"):
            raise ReplyError("no reply came")
        return Completion(reply)

    def _status_error(self, response: Any) -> Any:
        with suppress(Exception):
            self.body = read_json(read_text(self.pieces(response)))
        message = server_message(self.body) or response.reason
        advice = find_advice(f"{self.status} {message[:2000]}")
        kind, url = STATUSES.get(self.status, APIStatusError), self.client._url
        error = kind(f"HTTP {self.status} from {url}{advice}: {message}")
        error.retryable = not advice and self.status in RETRIED
        value = response.headers["Retry-After"]
        with suppress(Exception):
            date = email.utils.parsedate_tz(value)
            delay = email.utils.mktime_tz(date) - time.time() if date else float(value)
            error.retry_after = delay if delay >= 0 else None
        return error

    def to_error(self, cause: Any, kind: Any = APIConnectionError) -> Any:
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
    """Settings, which threads may share.  Raises InvalidRequestError for a bad value.

    token, base_url, model  None: DEEPINFRA_TOKEN, DEEPINFRA_BASE_URL, NEMOTRON_MODEL
    timeout   seconds of silence on the connection
    deadline  seconds for a whole call, with its retries and waits
    retries   None: 2, in a batch 6
    """

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
        require(isinstance(token, str), "token must be a string")
        if base_url is None:
            base_url = os.environ.get("DEEPINFRA_BASE_URL") or BASE_URL
        self.base_url = base_url
        self.model = model or os.environ.get("NEMOTRON_MODEL") or MODEL
        self.timeout = 600.0 if timeout is None else timeout
        self.deadline, self.retries = deadline, retries
        for name, value in vars(self).items():
            check_value(name, value)
        match: Any = re.fullmatch(URL, self.base_url)
        valid = match and 0 < int(match["port"] or 1) < 65536
        require(valid, "base_url must be https://..., or http: loopback")
        self._local = bool(match["loopback"])
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._token, self._lock = token.strip(), threading.Lock()
        self._clock, self._sleep = time.monotonic, time.sleep
        # the token, each character plain or escaped as in JSON
        forms = [rf"\\*(?:{re.escape(c)}|(?i:u{ord(c):04x}))" for c in self._token]
        self._secret = re.compile(r"(?<!\\)" + "".join(forms))

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

        requests  prompts (str), or dicts with messages, a prompt or a body
        output    a file to append rows to; what has one there without an error is
                  neither sent again nor yielded
        params    defaults for every request

        A row is {"id", "custom_id", "request", "response", "error"}.  Raises
        AuthenticationError for a refused token, NemotronError for a full disk.
        """
        return Batch(self, requests, jobs, params).rows(enumerate(requests, 1))

    def _body(self, messages: Any, params: Any) -> JSON:
        given = {"model": self.model, **check_parameters(params)}
        return build_request(messages, **given)

    def _redact(self, value: Any, depth: int = 0) -> Any:
        """Return JSON without the token, at most MAX_DEPTH deep."""
        redact, depth = self._redact, depth + 1
        if depth > MAX_DEPTH:
            return "..."
        if isinstance(value, dict):
            return {redact(k): redact(v, depth) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [redact(item, depth) for item in value]
        if isinstance(value, str) and len(self._token) >= 8:  # or it may be a word
            return self._secret.sub("[token]", value)
        return value

    def _headers(self) -> Any:
        if not re.fullmatch("[ -~]*" if self._local else "[ -~]+", self._token):
            raise AuthenticationError("set a valid DEEPINFRA_TOKEN, or try --offline")
        token = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return {"Content-Type": "application/json", "User-Agent": "nemotron", **token}

    def _open(self, payload: bytes, timeout: float) -> Any:
        request = urllib.request.Request(self._url, payload, self._headers())
        with self._lock:  # reads the certificates once
            opener = self._opener
        return opener.open(request, timeout=timeout)

    @functools.cached_property
    def _opener(self) -> Any:
        """Like urllib's own, but without redirects and file:// URLs."""
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.HTTPHandler())
        opener.add_handler(urllib.request.ProxyHandler({} if self._local else None))
        if self._url[:5].lower() == "https":
            import ssl

            context = ssl.create_default_context()
            opener.add_handler(urllib.request.HTTPSHandler(context=context))
        return opener


class Stream(contextlib.AbstractContextManager["Stream"]):
    """A reply as it arrives; iterating yields the text of choice 0, piece by piece.

    Reading raises IncompleteReplyError if the reply stops before its end, or ReplyError
    if the server sends something else; later reads raise the same.
    """

    def __init__(self, exchange: Exchange, response: Any) -> None:
        self._exchange, self._response, self._merger = exchange, response, ChunkMerger()
        self._problem: Any = ConnectionError("the connection was closed")
        pieces = exchange.pieces(response)
        self._events = split_events(split_lines(pieces))
        if response.headers.get_content_type() in ("application/json", "text/html"):
            # One whole reply: make an event of it.
            self._events = (("", read_text(x)) for x in (pieces, [b"[DONE]"]))

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._events.close()
        self._response.close()

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self._read() if text)

    def __next__(self) -> str:
        return next(iter(self))

    def chunks(self) -> Iterator[Chunk]:
        """Yield every Chunk, instead of the text."""
        return (Chunk(chunk) for chunk, _ in self._read())

    def completion(self) -> Completion:
        """Read the rest, and return the whole reply."""
        for _ in self._read():
            pass
        return self._merger.completion()

    def _read(self) -> Any:
        """Yield (chunk, text); then raise _problem, unless the reply has ended."""
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
                elif not chunk or data[:1] == ":":
                    continue  # it keeps the connection alive
                text = merger.add(chunk, data)
                exchange.ended = merger.finished
                yield chunk, text
        except Exception as problem:
            self._problem = problem
        self.close()
        if self._problem and not merger.finished:
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


# ---- Batch


def read_request(item: Any, defaults: JSON) -> JSON:
    """Return a body: the item's own fields, else the defaults."""
    item = {"prompt": item} if isinstance(item, str) else item
    fields: Any = dig({}, item, "body") or item
    require(isinstance(fields, dict), "not an object or a string")
    extra = {**defaults.get("extra", {}), **fields}
    for name in ("custom_id", "stream", "stream_options"):
        extra.pop(name, None)
    messages = extra.pop("messages" if "messages" in fields else "prompt", None)
    own = {name: extra.pop(name) for name in REQUEST_NAMES[:-1] if name in fields}
    params = {**defaults, **check_parameters(own), "extra": extra}
    if is_list_of(dict, messages) and any(m.get("role") == "system" for m in messages):
        params["system"] = own.get("system")  # not the default
    return build_request(messages, **params)


@contextmanager
def reporting(path: Any, kind: Any = InvalidRequestError) -> Any:
    """Name the file in an error about it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        name = "standard input" if path == "-" else path
        raise kind(f"{name}: {describe(error)}") from error


def lock_file(file: Any, wait: bool) -> None:
    """Raises ValueError if another run has it."""
    try:
        fcntl: Any = __import__("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ValueError("another run writes to it") from None
    except (ImportError, OSError) as error:  # Windows, and some file systems
        log_warning(f"no lock, so run it once at a time: {describe(error)}")


def row_key(row: JSON) -> bytes:
    """Digest a request, and its name unless that is line-N."""
    import hashlib

    name = re.sub(r"^line-\d+$", "", str(row.get("custom_id")))
    text = json.dumps([name, row.get("request")], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def open_output(path: Any, source: Any) -> Any:
    """Return the file to append to, and how often it answers each key."""
    answered: Any = Counter()
    if path is None:
        return None, answered
    check_value("output", path)
    with reporting(path), ExitStack() as stack:
        file = stack.enter_context(open(path, "a+b"))
        require(os.path.isfile(path), "not a regular file")
        with suppress(AttributeError, OSError):
            same = os.path.sameopenfile(source.fileno(), file.fileno())
            require(not same, "it is the input")
        lock_file(file, wait=False)
        file.seek(0)
        for number, line in enumerate(file, 1):
            row, is_whole = read_json(line.decode()), line.endswith(b"\n")
            start = b'{"id": "batch_req_'[: len(line)]
            if {"response", "error"} <= dig({}, row).keys():
                answered[row_key(row)] += row["error"] is None
                if not is_whole:
                    file.write(b"\n")
            elif is_whole or row != line.decode() or not line.startswith(start):
                raise ValueError(f"line {number} is not a row")
            else:  # torn: no line end, no JSON, but our start
                file.truncate(file.tell() - len(line))
        stack.pop_all()
        return file, answered


def row_error(error: Any, code: str) -> JSON:
    return {"code": getattr(error, "code", code), "message": one_line(describe(error))}


class Batch:
    """Threads that take requests in turn and answer them."""

    FIRST_PAUSE = 1  # seconds

    def __init__(self, client: Client, source: Any, jobs: Any, params: Any) -> None:
        import queue

        __import__("logging")  # while files can be opened
        check_value("jobs", jobs)
        client._headers()  # raises without a token
        self.client, self._jobs, self.skipped = client, jobs or 8, 0
        self._path = params.pop("output", None)
        self._params = {"model": client.model, **check_parameters(params)}
        self._used: Any = queue.SimpleQueue()  # wakes a worker for each row used
        self._rows: Any = queue.SimpleQueue()  # {} only wakes rows(), None ends it
        self._turn, self._taken = threading.Lock(), 0
        self.lock = threading.RLock()  # its holder may garbage-collect rows()
        self._ended, self._failure = False, None  # take no more; why
        self.stopped = threading.Event()  # those in flight are dropped, too
        self.not_before, self.pauses = 0.0, 0
        self._output, self._answered = open_output(self._path, source)

    def rows(self, numbered: Any, parse: Any = lambda item: item) -> Iterator[JSON]:
        work = functools.partial(self._work, self._prepare(numbered, parse))
        received = 0
        try:
            threading.Thread(target=work, daemon=True).start()
            with suppress(RuntimeError, MemoryError):  # there may be a limit
                for _ in range(1, self._jobs):
                    threading.Thread(target=work, daemon=True).start()
            while not self._ended or received < self._taken:
                try:
                    row = self._rows.get()
                except KeyboardInterrupt as error:  # complete rows still come
                    self.end(error, at_once=True)
                    continue
                if row is None:
                    break
                if row:
                    received += 1
                    yield row
                    self._used.put(row)
        finally:
            self.end(at_once=True)
            with self.lock, suppress(AttributeError, OSError):
                self._output.close()
        if self._failure:
            raise self._failure

    def end(self, failure: Any = None, at_once: bool = False) -> None:
        """Take no more requests; at once: drop those in flight."""
        self._ended, self._failure = True, self._failure or failure
        if at_once:
            self.stopped.set()
        self._rows.put(None if at_once else {})
        self._used.put(None)

    def _work(self, requests: Any) -> None:
        row: Any = None
        try:
            while not self._ended:
                with self._turn:
                    row, body = next(requests, (None, None))
                    if self._ended or not row:
                        break
                    self._taken += 1
                self._answer(row, body)
                row = None
                self._used.get()
            self.end()  # wakes the next worker
        except BaseException as error:  # with a row: a full disk
            self.end(error, at_once=bool(row))

    def _prepare(self, numbered: Any, parse: Any) -> Any:
        """Yield a row, and a body if valid, for each request."""
        names = set()
        for number, item in numbered:
            name, body = f"line-{number}", None
            row: JSON = {"id": f"batch_req_{os.urandom(12).hex()}"}
            row.update(custom_id=name, request=None, response=None, error=None)
            try:
                item = parse(item)
                own: Any = dig(None, item, "custom_id")
                name = name if own is None else own
                require(isinstance(name, str), "custom_id must be a string")
                row["custom_id"] = name
                if name in names:
                    row["error"] = {"code": "duplicate_custom_id", "message": name}
                else:
                    names.add(name)
                    # as row_key() will read it
                    body = json.loads(to_json(read_request(item, self._params)))
                    row["request"] = self.client._redact(body, 1)
            except Exception as error:
                row["error"] = row_error(error, "invalid_request")
            key = row_key(row) if self._answered else None
            if body and self._answered[key]:
                self._answered[key] -= 1
                self.skipped += 1
            else:
                yield row, body

    def _answer(self, row: JSON, body: Any) -> None:
        if body:
            exchange = BatchExchange(self.client, body, self)
            try:
                exchange.send(exchange.read_completion)
                self.pauses = 0
            except Exception as error:
                row["error"] = row_error(error, "reply")
                if isinstance(error, AuthenticationError):
                    self.end(error)
            if exchange.status:
                response = {"status_code": exchange.status, "body": exchange.body}
                row["response"] = {**response, "request_id": exchange.request_id}
        row = self.client._redact(row)
        with self.lock, reporting(self._path, NemotronError):
            if self._output and not self.stopped.is_set():
                self._output.write(json.dumps(row).encode() + b"\n")
                self._output.flush()
        self._rows.put(row)


class BatchExchange(Exchange):
    """While the server is busy, all calls pause, and use up no retry."""

    def _wait(self, seconds: float) -> None:
        while not self.batch.stopped.wait(seconds):
            seconds = min(self.batch.not_before, self.deadline) - self.client._clock()
            if seconds <= 0:
                self._last_pause = self.batch.not_before
                return
        raise NemotronError("stopped")

    def _delay_after(self, error: Any) -> float:
        batch, now, timeout = self.batch, self.client._clock(), self.client.timeout
        no_file = getattr(error.__cause__, "errno", 0) == errno.EMFILE
        if no_file and self._paused < timeout:
            self._paused += 0.1
            return 0.1  # another call may close its files
        if not isinstance(error, RateLimitError):
            return super()._delay_after(error)
        delay = error.retry_after or 0
        if self._paused >= timeout or delay > min(timeout, self.deadline - now):
            raise error
        with batch.lock:
            if not delay and self._last_pause == batch.not_before:  # none began since
                delay = min(batch.FIRST_PAUSE * 2**batch.pauses, 60)
                batch.pauses += 1
            if delay:
                if batch.not_before <= now:
                    log_warning(f"pausing for {delay:.1f} s: {error}")
                batch.not_before = max(batch.not_before, now + delay)
            self._paused += max(batch.not_before - now, 0)
        return 0


# ---- Offline server


@contextmanager
def offline(**settings: Any) -> Iterator[Client]:
    """A Client for a server in this process that echoes the last user message."""
    import socketserver

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), serve) as server:
        server.daemon_threads = True
        server.socket.listen(1024)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield Client(**{**settings, "token": "", "base_url": url})
        finally:
            server.shutdown()


def serve(connection: Any, *_: Any) -> Any:
    with suppress(Exception), connection.makefile("rwb") as file:
        file.readline()
        size = http.client.parse_headers(file)["Content-Length"]
        request = read_json(read_text([file.read(int(size))]))
        file.write(f"HTTP/1.0 200 OK\r\nContent-Type: {echo(request)}".encode())


def echo(request: Any) -> str:
    messages: Any = dig([], request, "messages")
    turns = [turn for turn in messages if dig("", turn, "role") == "user"]
    parts: Any = dig([], turns, -1, "content")
    text = dig("", turns, -1, "content")
    text += "".join(dig("", part, "text") for part in parts)
    words = re.findall(r"\s*\S+|\s+$", text)
    count, is_stream = len(words), dig(False, request, "stream")
    usage = {"prompt_tokens": count, "completion_tokens": count, "estimated_cost": 0}
    usage["total_tokens"] = 2 * count
    key, kind = ("delta", ".chunk") if is_stream else ("message", "")

    def reply(text: str, reason: Any = None) -> str:
        part = {key: {"role": "assistant", "content": text}, "finish_reason": reason}
        choices = [{"index": i, **part} for i in range(dig(1, request, "n"))]
        head: JSON = {"id": "offline", "object": "chat.completion" + kind}
        head.update(created=0, model=dig("", request, "model"))
        return to_json({**head, "choices": choices, "usage": usage if reason else None})

    if not is_stream:
        return "application/json\r\n\r\n" + reply(text, "stop")
    chunks = [*map(reply, words), reply(STOP_TOKEN, "stop"), "[DONE]"]
    return "text/event-stream\r\n\r\ndata: " + "\n\ndata: ".join(chunks) + "\n\n"


# ---- Command line: options

USAGE = "[options] [PROMPT ...]"
HELP_END = """\
examples:
  %(prog)s 'Hello!'
  git diff | %(prog)s 'Write a commit message.'
  %(prog)s --batch topics.txt --output rows.jsonl 'Ask about {}.'

exit status:
  0    complete
  1    failed; error rows
  2    usage error
  3    not complete; --max-cost reached
  4    token missing or refused
  5    server busy
  130  Ctrl-C
  141  output closed"""
OPTIONS = read_table("""\
prompt | -c --conversation | PATH | continue a conversation
| -i --interactive | | chat, a turn a line
| -n --no-stdin | | ignore standard input
| -u --usage | | show tokens, cost and seconds
| --json | | print the server's JSON
| --no-stream | | wait for the whole reply
| --dry-run | | only print the request
batch | --batch | FILE | send each line (-: standard input)
| --output | FILE | append rows; skip those there
| -j --jobs | an integer | at a time, 1 to 200; default: 8
| --max-cost | a number | US dollars to stop at
server | --base-url | URL | default: DEEPINFRA_BASE_URL
| --timeout | a number | seconds of silence; default: 600
| --deadline | a number | seconds for a whole call
| --retries | an integer | default: 2, in a batch 6
| --offline | | echo the prompt, no network
request | -s --system | TEXT | system message
| -m --model | ID | default: NEMOTRON_MODEL
| -o --option | KEY VALUE | any field: JSON, @FILE or text""")


def build_parser() -> Any:
    import argparse

    parser: Any = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda text: require(False, text.split("=")[0])  # no token
    parser.usage, parser.epilog = f"%(prog)s {USAGE}", HELP_END
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", nargs="*", help="the prompt")
    parser.add_argument("--version", action="version", version=__version__)
    kinds: Any = {
        "": {"action": "store_true"},
        "PATH": {"metavar": "FILE", "type": os.path.realpath},
        "KEY VALUE": {"action": "append", "nargs": 2, "metavar": ("KEY", "VALUE")},
        "a number": {"type": float, "metavar": "X"},
        "an integer": {"type": int, "metavar": "N"},
        "1 to 16 strings": {"action": "append", "metavar": "TEXT"},
    }
    rows = OPTIONS + [
        ["", "--" + name.replace("_", "-"), kind, f"{limits or kind}: {text}"]
        for name, kind, limits, _, text in PARAMETERS[:-3]  # those need -o
    ]
    group = parser
    for title, flags, kind, text in rows:
        if title:
            group = parser.add_argument_group(title)
        settings = kinds.get(kind, {"metavar": kind if kind.isupper() else "TEXT"})
        group.add_argument(*flags.split(), help=text, **settings)
    return parser


def parse_options(argv: list[str]) -> Any:
    argv = [os.fsencode(arg).decode("utf-8", "surrogateescape") for arg in argv]
    end = [*argv, "--"].index("--")  # after it, all are words
    args = build_parser().parse_intermixed_args(argv[:end])
    args.words += argv[end + 1 :]
    unfit, verb = ["output", "jobs", "max_cost"], "needs"
    if args.batch is not None:
        unfit, verb = ["conversation", "interactive", "json", "dry_run"], "excludes"
    for name in unfit:
        require(not getattr(args, name), f"{name} {verb} --batch")
    args.stream = not (args.json or args.no_stream)
    extra: JSON = {}
    if args.usage and args.stream:
        extra["stream_options"] = {"include_usage": True}
    for key, value in args.option or ():
        extra[key] = read_json(read_file(value[1:]) if value[:1] == "@" else value)
    params = {row[0]: getattr(args, row[0], None) for row in PARAMETERS}
    args.params = check_parameters({**params, "system": args.system, "extra": extra})
    return args


# ---- Command line: one reply and conversations


def warn(message: Any) -> None:
    with suppress(OSError, ValueError):  # it may be full or closed
        print("nemotron:", one_line(str(message)), file=sys.stderr)


def write_reply(pieces: Any) -> None:
    """Write a reply, without its leading white space."""
    show = escape_controls if sys.stdout.isatty() else str
    rest = itertools.dropwhile(str.isspace, pieces)
    first, held = next(rest, "").lstrip(), ""  # held: newlines, maybe the last
    try:
        for piece in itertools.chain([first], rest):
            held += piece
            line = held.rstrip("\r\n")
            held = held[len(line) :]
            sys.stdout.write(show(line))
            sys.stdout.flush()
    finally:
        print()


def open_input(path: str) -> Any:
    if path != "-":
        return open(path, "rb")
    if sys.platform != "win32":
        os.set_blocking(sys.stdin.fileno(), True)
        if not select.select([sys.stdin], [], [], 2)[0]:
            warn("waiting for standard input (or use -n)")
    return open(sys.stdin.fileno(), "rb", closefd=False)


def read_file(path: str) -> str:
    with reporting(path), open_input(path) as file:
        return str(file.read(), "utf-8-sig").rstrip("\r\n")


def read_prompt(args: Any) -> str:
    words = args.words
    if args.no_stdin or ("-" not in words and sys.stdin.isatty()):
        return " ".join(words)
    place = [*words, "-"].index("-")
    parts = " ".join(words[:place]), read_file("-"), " ".join(words[place + 1 :])
    return "\n\n".join(filter(None, parts))


def load_messages(path: str) -> Any:
    with reporting(path):
        tempfile.TemporaryFile(dir=os.path.dirname(path)).close()  # writable?
        if not os.path.exists(path):
            return None
        with open(path, "rb+") as file:  # "+" refuses a pipe
            return check_messages(json.load(file))


def save_messages(path: str, before: Any, after: Any) -> None:
    """Replace the file, if it still holds the messages `before`."""
    folder = os.path.dirname(path)
    with reporting(path, NemotronError), ExitStack() as stack:
        with suppress(OSError):  # Windows cannot open a folder
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            lock_file(lock, wait=True)
        if load_messages(path) != before:
            raise ValueError("changed meanwhile")
        temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        with tempfile.NamedTemporaryFile(dir=temporary, delete=False) as file:
            file.write(json.dumps(after, indent=1).encode())
        with suppress(OSError):  # a new file is 0600
            shutil.copymode(path, file.name)
        os.replace(file.name, path)


def finish_problem(reply: Completion) -> str:
    choices: list[Any] = dig([], reply, "choices")
    reasons = {dig("", choice, "finish_reason") for choice in choices}
    return ", ".join(reasons.intersection(INCOMPLETE))


def format_cost(cost: Any) -> str:
    if cost is None or math.isnan(cost):
        return "cost unknown"
    return f"${cost:.8f}".rstrip("0").rstrip(".")


def send_turn(args: Any, saved: Any, prompt: str) -> Any:
    client, began = args.client, time.monotonic()
    turns = [m for m in saved or () if args.system is None or m["role"] != "system"]
    if prompt:
        turns.append({"role": "user", "content": prompt})
    require(turns and turns[-1]["role"] != "assistant", f"usage: nemotron.py {USAGE}")
    body = client._body(turns, args.params)
    if args.dry_run:
        print(to_json({**body, "stream": True} if args.stream else body))
        return saved, 0
    require(args.json or body.get("n", 1) == 1, "n over 1 needs --json or --batch")
    if args.stream:
        with client.stream(turns, **args.params) as stream:
            write_reply(stream)
            reply = stream.completion()
    else:
        reply = client.chat(turns, **args.params)
        write_reply([json.dumps(reply) if args.json else reply.text])
    problem = finish_problem(reply)
    if problem:
        warn(f"not complete: finish_reason {problem}")
    if args.usage:
        get, model = reply.usage.get, dig(client.model, reply, "model")
        line = f"{get('prompt_tokens', '?')} + {get('completion_tokens', '?')} tokens"
        line += f", {format_cost(reply.cost)}, {time.monotonic() - began:.1f} s"
        line += f", model {model}" if model != client.model else ""
        warn(client._redact(line))
    messages = [*body["messages"], reply.message]
    if args.conversation:
        save_messages(args.conversation, saved, messages)
    return messages, 3 if problem else 0


def converse(args: Any) -> int:
    saved = args.conversation and load_messages(args.conversation)
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
    while True:
        try:
            with contextlib.redirect_stdout(screen):
                text, words = (words or input(prompt)).lstrip("\ufeff").strip(), ""
            if text == "exit":
                return 0
            if text:
                saved, _ = send_turn(args, saved, text)
        except EOFError:
            draw("")
            return 0
        except (NemotronError, KeyboardInterrupt) as error:
            warn(str(error) or "this turn is dropped")


# ---- Command line: batches, and the start


def draw(text: str) -> None:
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width].ljust(width)}\r", end="", file=sys.stderr, flush=True)


class Progress:
    cost, done, in_a_row = 0.0, 0, 0

    def __init__(self, batch: Batch, total: int) -> None:
        self.batch, self.total, self.began = batch, total, time.monotonic()
        self.counts = Counter(failed=0)

    def add(self, row: JSON) -> None:
        error, reply = row["error"], Completion(dig({}, row, "response", "body"))
        self.done += 1
        if error:
            if not self.counts["failed"]:
                draw("")
                warn(f"first failure, {row['custom_id']}: {error['message']}")
            self.counts.update(["failed", error["code"]])
            self.in_a_row += row["request"] is not None
            if self.in_a_row == 20:
                self.batch.end(NemotronError("20 failures in a row"))
        else:
            self.counts["not complete"] += bool(finish_problem(reply))
            self.cost += math.nan if reply.cost is None else reply.cost
            self.in_a_row = 0

    def lines(self, args: Any, file: Any) -> Any:
        with reporting(args.batch, NemotronError):
            for number, line in enumerate(file, 1):
                if line.strip():
                    if args.max_cost is not None and not self.cost < args.max_cost:
                        raise IncompleteReplyError("--max-cost reached or cost unknown")
                    yield number, line

    def summary(self) -> str:
        rate = self.done / (time.monotonic() - self.began or 0.001)
        done = self.done + self.batch.skipped
        text = f"{done} of {self.total or '?'} done"
        for name, count in self.counts.items():
            text += f", {count} {name}"
        text += f", {format_cost(self.cost)}, {rate:.1f}/s"
        if self.done and self.total > done:
            text += f", {(self.total - done) / rate:.0f} s left"
        return text


def run_batch(args: Any) -> int:
    require((args.max_cost or 0) >= 0, "max_cost must be 0 or more")
    template = " ".join(args.words) or "{}"
    if "{}" not in template:
        template += "\n\n{}"
    with reporting(args.batch):
        file, total = open_input(args.batch), 0
        if args.batch != "-" and os.path.isfile(args.batch):
            total = sum(1 for line in file if line.strip())
            file.seek(0)
    batch = Batch(args.client, file, args.jobs, {**args.params, "output": args.output})
    progress = Progress(batch, total)

    def parse(line: bytes) -> Any:
        text = line.decode("utf-8-sig").strip()
        item = json.loads(text) if text[:1] in '{["' else text
        return template.replace("{}", item) if isinstance(item, str) else item

    try:
        for row in batch.rows(progress.lines(args, file), parse):
            try:
                if args.output is None:
                    sys.stdout.write(json.dumps(row) + "\n")
                progress.add(row)
                draw(progress.summary())
            except KeyboardInterrupt as error:
                batch.end(error, at_once=True)
        status = 3 if progress.counts["not complete"] else 0
    except NemotronError as error:
        draw("")
        warn(error)
        status = error.exit_status
    finally:
        draw("")
        warn(progress.summary())
        if total:  # else a thread may read it
            file.close()
    return 1 if progress.counts["failed"] and status != 4 else status


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    sys.stdin = sys.stdin or open(os.devnull)  # if closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        require(sys.stdout, "no standard output")
        files: Any = (sys.stdin, sys.stdout, sys.stderr)
        for file in files:
            file.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
        with suppress(SystemExit):  # -h, --version
            args = parse_options(sys.argv[1:] if argv is None else argv)
            names = ("model", "base_url", "timeout", "deadline", "retries")
            settings = {name: getattr(args, name) for name in names}
            server: Any = offline(**settings) if args.offline else None
            with server or contextlib.nullcontext(Client(**settings)) as args.client:
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
        if getattr(error, "errno", 0) in (errno.EPIPE, errno.EINVAL):  # Windows: EINVAL
            return 141
        name = "standard output" if isinstance(error, OSError) else type(error).__name__
        warn(f"{name}: {describe(error)}")
        return 1


if __name__ == "__main__":
    os._exit(main())  # tearing Python down takes time
