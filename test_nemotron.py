"""Tests of nemotron.py: standard library only, no network but loopback.

`Server` answers with what a case says, byte for byte.  Nothing sleeps to let time pass: a
Client has a clock and a sleep of its own, and what must wait waits for an event.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import io
import itertools
import json
import logging
import os
import pathlib
import pickle
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import nemotron

HERE = pathlib.Path(__file__).resolve().parent
TOKEN = "s3cret-token/of+tests=="
POSIX = os.name == "posix"

# --------------------------------------------------------------- The loopback server

Answer = collections.namedtuple("Answer", "pieces status headers framing end")


def answer(*pieces, status=200, headers=(), framing="length", end="clean"):
    """What the server sends.

    framing is length, chunked (one chunk for each piece) or close; end is clean, short
    (the framing promises more), reset, or stall.
    """
    raw = [p.encode() if isinstance(p, str) else p for p in pieces]
    return Answer(raw, status, dict(headers), framing, end)


def sse(*datas, done=True, framing="chunked", headers=(), **kwargs):
    """A stream with these objects (or texts) as its data."""
    texts = [d if isinstance(d, str) else json.dumps(d) for d in datas]
    texts += ["[DONE]"] * done
    headers = {"Content-Type": "text/event-stream", **dict(headers)}
    pieces = [f"data: {text}\n\n" for text in texts]
    return answer(*pieces, framing=framing, headers=headers, **kwargs)


def delta(content=None, finish=None, index=0, **fields):
    """A chunk that adds content to a choice."""
    part = {} if content is None else {"role": "assistant", "content": content}
    choice = {"index": index, "delta": part, "finish_reason": finish}
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
    return {**head, "choices": [choice], **fields}


END = delta(finish="stop")
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "estimated_cost": 0.25,
}


def completion(content="ok", finish="stop", **fields):
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    head = {"id": "c1", "object": "chat.completion", "created": 7, "model": "m"}
    return {**head, "choices": [choice], "usage": USAGE, **fields}


def reply(*args, **kwargs):
    return answer(json.dumps(completion(*args, **kwargs)))


def last_text(request):
    return request.json["messages"][-1]["content"]


def echo(request):
    """Answer with the last message, at a cost of 0.25."""
    text = last_text(request)
    if request.json.get("stream"):
        return sse(delta(text), delta(finish="stop", usage=USAGE))
    return reply(text)


class Request:
    def __init__(self, line, headers, body):
        self.method, self.path, _ = line.split(" ")
        self.headers = {name.lower(): value for name, value in headers}
        self.json = json.loads(body) if body else None


class Server:
    """Answers on 127.0.0.1 with `answers`, one for each request, the last for the rest.

    An answer may be a function of the Request; None closes the connection.
    """

    def __init__(self, *answers):
        self._answers, self._lock = answers, threading.Lock()
        self.requests, self.in_flight, self.most_in_flight = [], 0, 0
        self.over = threading.Event()  # lets a stall end
        self.tls = None  # or an SSLContext
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self.over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def client(self, **settings):
        """A client of this server that does not sleep; `slept` has the seconds."""
        settings = {"token": TOKEN, "base_url": self.url, "timeout": 30, **settings}
        client = nemotron.Client(**settings)
        client.slept = []
        client._sleep = client.slept.append
        return client

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(connection,), daemon=True
            ).start()

    def _serve(self, connection):
        if self.tls:
            try:
                connection = self.tls.wrap_socket(connection, server_side=True)
            except OSError:
                connection.close()
                return
        with connection, contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection.makefile("rb") as file:
                line = file.readline().decode().strip()
                headers = []
                while header := file.readline().decode().strip():
                    headers.append(header.split(": ", 1))
                length = int(dict(headers).get("Content-Length", 0))
                body = file.read(length)
                if not line or len(body) < length:  # the client is gone
                    return
            with self._lock:
                number = len(self.requests)
                self.requests.append(Request(line, headers, body))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                source = self._answers[min(number, len(self._answers) - 1)]
                what = source(self.requests[number]) if callable(source) else source
                if what is not None:
                    self._send(connection, what)
            finally:
                with self._lock:
                    self.in_flight -= 1

    def _send(self, connection, what):
        headers = dict(what.headers)
        if what.framing == "length":
            extra = 10 if what.end != "clean" else 0
            headers["Content-Length"] = sum(map(len, what.pieces)) + extra
        elif what.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {what.status} Reason\r\n{head}\r\n"
        connection.sendall(head.encode("latin-1"))
        for piece in what.pieces:
            if what.framing == "chunked":
                piece = b"%x\r\n%s\r\n" % (len(piece), piece)
            connection.sendall(piece)
        if what.framing == "chunked" and what.end == "clean":
            connection.sendall(b"0\r\n\r\n")
        if what.end == "stall":
            self.over.wait(60)
        if what.end == "reset":
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def environment(**extra):
    keep = ("PATH", "HOME", "SYSTEMROOT", "TMPDIR")
    base = {name: os.environ[name] for name in keep if name in os.environ}
    return {**base, **extra}


def program(*args, stdin=b"", file=None, env=(), stdout=subprocess.PIPE):
    """Run nemotron.py; return its status, standard output and standard error."""
    source = {"input": stdin} if file is None else {"stdin": file}
    done = subprocess.run(
        [sys.executable, str(HERE / "nemotron.py"), *map(str, args)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment(**dict(env)),
        timeout=120,
        **source,
    )
    return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()


class Case(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        names = [
            name
            for name in os.environ
            if name.startswith(("DEEPINFRA_", "NEMOTRON_")) or "proxy" in name.lower()
        ]
        patch = mock.patch.dict(os.environ)
        patch.start()
        self.addCleanup(patch.stop)
        for name in names:
            del os.environ[name]
        logger = logging.getLogger("nemotron")
        self.logged = []
        handler = logging.Handler()
        handler.emit = lambda record: self.logged.append(record.getMessage())
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)

    def serve(self, *answers):
        server = Server(*answers)
        self.addCleanup(server.close)
        return server

    def refused(self, call, *args, **kwargs):
        """Return the message of the InvalidRequestError that the call raises."""
        with self.assertRaises(nemotron.InvalidRequestError) as caught:
            call(*args, **kwargs)
        return str(caught.exception)


# ------------------------------------------------------------ Parameters and requests

# (name, accepted, refused), from the provider's page and OpenAPI file.
BOUNDS = (
    ("temperature", (0, 2, 0.7), (-0.001, 2.001, True, "1", float("nan"), 10**400)),
    ("top_p", (0.001, 1), (0, 1.001, -1)),
    ("min_p", (0, 1), (-0.001, 1.001)),
    ("top_k", (0, 999), (-1, 1000, 1.0, True)),
    ("max_tokens", (0, 1000000), (-1, 1000001, 10.0)),
    ("presence_penalty", (-2, 2), (-2.001, 2.001, float("inf"))),
    ("frequency_penalty", (-2, 2), (-2.001, 2.001)),
    ("repetition_penalty", (0.01, 5), (0.0099, 5.001)),
    ("seed", (0, 2**63 - 1), (-1, 2**63, 1.0)),
    ("tool_choice", ("none", "auto"), ("required", "", {}, [])),
    ("user", ("", "me"), (1, ["me"])),
    ("stop", ("x", ["x"], ["x"] * 16), ([], ["x"] * 17, [1], 1)),
    ("n", (1, 4), (0, 5, 1.0)),
    ("tools", ([], [{"type": "function"}]), ({}, ["f"])),
    ("response_format", ({"type": "json_object"},), ("json", [])),
)
USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "42", "tool_call_id": "1"}
GOOD_MESSAGES = {
    "one": [USER],
    "a conversation": [SYSTEM, USER, ASSISTANT, USER],
    "system in the middle": [USER, SYSTEM, ASSISTANT, USER],
    "system last": [USER, SYSTEM],
    "the answer of a tool": [USER, CALLS, TOOL],
    "no content but calls": [USER, {"role": "assistant", "tool_calls": [CALL]}, TOOL],
    "content in parts": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    "other keys": [{**USER, "name": "me"}],
    "a tuple": (USER,),
}
BAD_MESSAGES = {
    "empty": ([], "messages"),
    "system alone": ([SYSTEM], "messages"),
    "assistant last": ([USER, ASSISTANT], "messages[1]: the last"),
    "assistant last but system": ([USER, ASSISTANT, SYSTEM], "messages[1]"),
    "two systems": ([SYSTEM, USER, SYSTEM], "messages[2]: a second system"),
    "not an object": ([USER, "x"], "messages[1]"),
    "unknown role": ([{"role": "robot", "content": "x"}], "messages[0]: role"),
    "unhashable role": ([{"role": [], "content": "x"}], "messages[0]: role"),
    "no content": ([{"role": "user"}], "messages[0]: content"),
    "no parts": ([{"role": "user", "content": []}], "messages[0]: content"),
    "odd parts": ([{"role": "user", "content": ["x"]}], "messages[0]: content"),
    "null without calls": (
        [{"role": "assistant", "content": None}, USER],
        "messages[0]",
    ),
    "a tool without id": (
        [USER, CALLS, {"role": "tool", "content": ""}],
        "messages[2]",
    ),
    "a number": (5, "messages must be"),
    "none": (None, "messages must be"),
}


class RequestTests(Case):
    def test_bounds(self):
        names = [row[0] for row in nemotron.PARAMETERS]
        self.assertEqual(sorted(row[0] for row in BOUNDS), sorted(names))
        for name, accepted, refused in BOUNDS:
            for value in accepted:
                with self.subTest(name, accepted=value):
                    body = nemotron.build_request("x", **{name: value})
                    self.assertEqual(body[name], value)
            for value in refused:
                with self.subTest(name, refused=repr(value)[:20]):
                    message = self.refused(nemotron.build_request, "x", **{name: value})
                    self.assertTrue(message.startswith(f"{name} must be "), message)
        message = self.refused(nemotron.build_request, "x", temperature=3)
        self.assertEqual(message, "temperature must be a number, 0 <= x <= 2; got 3")

    def test_the_typed_parameters_agree_with_the_table(self):
        tree = ast.parse((HERE / "nemotron.py").read_text(encoding="utf-8"))
        (typed,) = (n for n in ast.walk(tree) if getattr(n, "name", "") == "Params")
        fields = {
            field.target.id: ast.unparse(field.annotation) for field in typed.body
        }
        kinds = {
            "a number": "float",
            "an integer": "int",
            "a string": "str",
            "none or auto": "str",
            "a string or a list of 1 to 16": "str | list[str]",
            "a list of objects": "list[JSON]",
            "an object": "JSON",
        }
        expected = {row[0]: f"{kinds[row[1]]} | None" for row in nemotron.PARAMETERS}
        expected.update(model="str | None", system="str | None", extra="JSON | None")
        self.assertEqual(fields, expected)

    def test_what_is_not_given_is_not_sent(self):
        nothing = dict.fromkeys(row[0] for row in nemotron.PARAMETERS)
        body = nemotron.build_request(
            "x", system=None, extra=None, model=None, **nothing
        )
        message = {"role": "user", "content": "x"}
        self.assertEqual(body, {"model": nemotron.MODEL, "messages": [message]})
        self.assertEqual(nemotron.build_request("x", stream=True)["stream"], True)

    def test_unknown_names(self):
        for name, advice in (
            ("temprature", "did you mean temperature?"),
            ("top-k", "did you mean top_k?"),
            ("system_prompt", "did you mean system?"),
            ("timeout", "belongs to Client()"),
            ("jobs", "belongs to batch()"),
            ("stream", "calling stream()"),
        ):
            with self.subTest(name):
                message = self.refused(
                    nemotron.Client(token="t").chat, "x", **{name: 5}
                )
                self.assertIn(advice, message)

    def test_extra_is_not_checked_and_goes_last(self):
        extra = {"logprobs": True, "temperature": 9}
        body = nemotron.build_request("x", temperature=1, extra=extra)
        self.assertEqual((body["logprobs"], body["temperature"]), (True, 9))
        for name in ("messages", "model", "stream"):
            self.assertIn(
                name, self.refused(nemotron.build_request, "x", extra={name: 1})
            )
        self.refused(nemotron.build_request, "x", extra=[1])

    def test_what_is_not_json_is_not_sent(self):
        server, loop = self.serve(reply()), []
        loop.append(loop)
        for value in (float("nan"), {1, 2}, object(), loop):
            self.refused(server.client().chat, "x", extra={"y": value})
        self.assertEqual(server.requests, [])

    def test_messages(self):
        for name, messages in GOOD_MESSAGES.items():
            with self.subTest(name):
                body = nemotron.build_request(messages)
                self.assertEqual(body["messages"], list(messages))
        for name, (messages, expected) in BAD_MESSAGES.items():
            with self.subTest(name):
                self.assertIn(expected, self.refused(nemotron.build_request, messages))

    def test_system(self):
        body = nemotron.build_request("u", system="s")
        self.assertEqual(body["messages"], [SYSTEM, USER])
        self.refused(nemotron.build_request, [SYSTEM, USER], system="s")
        self.refused(nemotron.build_request, "u", system=5)

    def test_the_objects_of_the_caller_stay_as_they_are(self):
        messages, before = [SYSTEM, USER], json.dumps([SYSTEM, USER])
        body = nemotron.build_request(messages)
        body["messages"][1]["content"] = "changed"
        self.assertEqual(json.dumps(messages), before)


# ----------------------------------------------------------------- Replies and errors

ODD = (None, 5, "x", [], {}, [None], [5], ["x"], [[]], [{}], {"0": {}}, True)
ODD_CHOICES = (
    [{"index": None}],
    [{"index": 0, "message": None, "delta": None}],
    [{"message": {"content": 5, "tool_calls": 5}, "finish_reason": 5}],
    [{"message": {"content": ["x"], "tool_calls": [5]}}],
    [{"index": [], "delta": {"content": {}}}],
)


class ReplyTests(Case):
    def test_the_properties_never_raise(self):
        for value in (*ODD, *ODD_CHOICES):
            for kind in (nemotron.Completion, nemotron.Chunk):
                with self.subTest(kind.__name__, value=value):
                    one = kind(choices=value, usage=value)
                    seen = (one.text, one.finish_reason, type(one.usage))
                    self.assertEqual(seen, ("", None, dict))
            message = {"role": "assistant", "content": ""}
            seen = (one.__class__, nemotron.Completion(choices=value, usage=value))
            self.assertEqual((seen[1].message, seen[1].tool_calls), (message, []))
            self.assertIsNone(seen[1].cost)

    def test_choice_0_is_the_one_with_that_index(self):
        choices = [
            {"index": 1, "message": {"content": "b"}},
            {"index": 0, "message": {"content": "a"}, "finish_reason": "stop"},
        ]
        one = nemotron.Completion(choices=choices)
        self.assertEqual((one.text, one.finish_reason), ("a", "stop"))
        self.assertEqual(nemotron.Chunk(delta("b", index=1)).text, "")

    def test_cost(self):
        for usage, expected in (
            ({"estimated_cost": 0.5, "cost": 9}, 0.5),
            ({"cost": 0.25}, 0.25),
            ({"estimated_cost": None, "cost": 0}, 0),
            ({"cost": -1}, -1),
            ({"cost": "1"}, None),
            ({"cost": True}, None),
            ({"cost": 10**400}, None),
            ({"cost": float("nan")}, None),
        ):
            with self.subTest(usage):
                self.assertEqual(nemotron.Completion(usage=usage).cost, expected)

    def test_message_goes_into_the_next_request(self):
        message = {"content": None, "tool_calls": [CALL], "refusal": None}
        whole = nemotron.Completion(choices=[{"message": message}])
        self.assertEqual(whole.message["tool_calls"], [CALL])
        nemotron.build_request([USER, whole.message, TOOL])

    def test_errors(self):
        names = [name for name in nemotron.__all__ if name.endswith("Error")]
        self.assertEqual(len(names), 9)
        for name in names:
            with self.subTest(name):
                error = getattr(nemotron, name)("a\nb\x1b[31m\u202e")
                self.assertEqual(str(error), "a b\\x1b[31m\\u202e")
                error.status_code = 418
                again = pickle.loads(pickle.dumps(error))
                seen = (type(again), str(again), again.status_code)
                self.assertEqual(seen, (type(error), str(error), 418))
        statuses = {name: getattr(nemotron, name).exit_status for name in names}
        self.assertEqual(
            {name: status for name, status in statuses.items() if status != 1},
            {
                "InvalidRequestError": 2,
                "IncompleteReplyError": 3,
                "AuthenticationError": 4,
                "RateLimitError": 5,
            },
        )
        self.assertTrue(issubclass(nemotron.APITimeoutError, TimeoutError))
        self.assertTrue(issubclass(nemotron.InvalidRequestError, ValueError))


# ----------------------------------------------------------------- Server-sent events

SSE_CASES = {
    "LF": (b"data: a\n\ndata: b\n\n", ["a", "b"]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    "CR": (b"data: a\r\rdata: b\r\r", ["a", "b"]),
    "mixed": (b"data: a\r\n\ndata: b\r\r\n", ["a", "b"]),
    "BOM": (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
    "no space": (b"data:a\n\ndata:b\n\n", ["a", "b"]),
    "comments": (b": hi\n\n:\ndata: a\n: x\n\n", ["a"]),
    "several lines": (b"data: a\ndata: b\ndata\ndata: c\n\n", ["a\nb\n\nc"]),
    "other fields": (b"id: 1\nretry: 5\nwhat\ndatab: x\ndata: a\n\n", ["a"]),
    "no empty line at the end": (b"data: a\n\ndata: 5\n", ["a", "5"]),
    "no line end at the end": (b"data: a\n\ndata: [DONE]", ["a", "[DONE]"]),
    "torn": (b'data: a\n\ndata: {"a', ["a"]),
    "separators of Unicode": (
        "data: a\u2028b\x85c\x0bd\n\n".encode(),
        ["a\u2028b\x85c\x0bd"],
    ),
    "UTF-8": ("data: \u00e9\u20ac\U0001f600\n\n".encode(), ["\u00e9\u20ac\U0001f600"]),
    "bad UTF-8": (b"data: \xff\n\n", ["\ufffd"]),
    "an event without data": (b"event: x\n\ndata: a\n\n", ["a"]),
    "nothing": (b"", []),
    "empty data": (b"data:\n\ndata: a\n\n", ["", "a"]),
}


def cuts(raw):
    """Yield the bytes whole, one by one, and cut at every place."""
    yield "whole", [raw]
    yield "bytes", [raw[i : i + 1] for i in range(len(raw))]
    for i in range(1, len(raw)):
        yield f"cut at {i}", [raw[:i], raw[i:]]


def split(pieces):
    return nemotron.split_events(nemotron.split_lines(iter(pieces)))


class EventTests(Case):
    def test_cases(self):
        for name, (raw, expected) in SSE_CASES.items():
            for cut, pieces in cuts(raw):
                with self.subTest(name, cut=cut):
                    self.assertEqual([data for _, data in split(pieces)], expected)

    def test_names(self):
        raw = b"event: error\ndata: a\n\ndata: b\n\nevent: error\ndata: torn"
        expected = [("error", "a"), ("", "b"), ("error", "torn")]
        self.assertEqual(list(split([raw])), expected)

    def test_an_event_comes_as_soon_as_its_line_has_come(self):
        came, got = [], []

        def pieces():
            for piece in (b"data: a\n\r", b"\ndata: b\r", b"\r"):
                yield piece
                came.append(len(got))

        for _, data in split(pieces()):
            got.append(data)
        self.assertEqual((came[0], got), (1, ["a", "b"]))


# ------------------------------------------------------------------------- Streaming

# name: (data of the events, the pieces of text); all of them end well.
STREAMS = {
    "plain": ([delta("a"), delta("b"), END], ["a", "b"]),
    "text in the last": ([delta("a"), delta("b", "stop")], ["a", "b"]),
    "stop token": ([delta("a"), delta(""), delta("</s>"), END], ["a"]),
    "stop token is text": (
        [delta("a"), delta("</s>"), delta("b", "stop")],
        ["a", "</s>b"],
    ),
    "two stop tokens": ([delta("</s>"), delta("</s>", "stop")], ["</s>"]),
    "not quite a stop token": ([delta("</s> "), END], ["</s> "]),
    "keep-alives": (["", "null", ": ping", ":", delta("a"), END], ["a"]),
    "chunks without choices": (
        [{}, {"choices": None}, {"choices": []}, delta("a"), END],
        ["a"],
    ),
    "no index": ([{"choices": [{"delta": {"content": "a"}}]}, END], ["a"]),
    "null index": (
        [{"choices": [{"index": None, "delta": {"content": "a"}}]}, END],
        ["a"],
    ),
    "null delta": (
        [{"choices": [{"index": 0, "delta": None}]}, delta("a"), END],
        ["a"],
    ),
    "usage apart": ([delta("a"), END, {"choices": [], "usage": USAGE}], ["a"]),
    "usage within": ([delta("a"), delta(finish="stop", usage=USAGE)], ["a"]),
    "usage twice": (
        [delta("a", usage={"total_tokens": 1}), END, {"choices": [], "usage": USAGE}],
        ["a"],
    ),
    "no reason but [DONE]": ([delta("a")], ["a"]),
    "half a character": ([delta("\ud83d"), delta("\ude00"), END], ["\ud83d", "\ude00"]),
    "text after the end": ([delta("a", "stop"), delta("b")], ["a"]),
    "error after the end": ([delta("a", "stop"), {"error": "late"}], ["a"]),
    "nonsense after the end": ([delta("a", "stop"), "{oops"], ["a"]),
    "two entries of one index": (
        [
            delta("a")
            | {"choices": delta("b")["choices"] + delta("c", "stop")["choices"]}
        ],
        ["bc"],
    ),
    "another choice": (
        [delta("x", index=1), delta("a"), END, delta("", "stop", 1)],
        ["a"],
    ),
}
# name: (data, the server's words); .partial has the text "a".
BROKEN = {
    "error": ([{"error": {"message": "busy now"}}], "busy now"),
    "error as text": ([{"error": "out of memory"}], "out of memory"),
    "error_message": (
        [{"choices": None, "error_message": "engine died"}],
        "engine died",
    ),
    "detail": ([{"detail": "no such thing"}], "no such thing"),
    "message": ([{"object": "error", "message": "no such model"}], "no such model"),
    "error in a choice": (
        [{"choices": [{"index": 0, "delta": {}, "error": {"message": "upstream"}}]}],
        "upstream",
    ),
    "not JSON": (["{oops"], "{oops"),
    "JSON but text": (['"hello"'], "hello"),
    "a list": (["[1]"], "[1]"),
    "deep": (["[" * 100000], "[[["),
    "deep objects": (['{"a":' * 600 + "1" + "}" * 600], "odd chunk"),
    "odd choices": ([{"choices": 5}], "odd chunk"),
    "odd choice": ([{"choices": [None]}], "odd chunk"),
    "odd delta": ([{"choices": [{"index": 0, "delta": "x"}]}], "odd chunk"),
    "odd content": ([delta(5)], "odd chunk"),
    "content in parts": ([delta(["x"])], "odd chunk"),
    "odd index": ([delta("x", index="0")], "odd chunk"),
    "escapes": ([{"error": "\x1b[2J\x00"}], "\\x1b[2J\\x00"),
}


class StreamTests(Case):
    def client_of(self, *answers, **settings):
        return self.serve(*answers).client(**settings)

    def test_streams(self):
        for name, (datas, texts) in STREAMS.items():
            raw = b"".join(sse(*datas).pieces)
            single = [raw[i : i + 1] for i in range(len(raw))]
            for cut, pieces in (("whole", [raw]), ("bytes", single)):
                client = self.client_of(answer(*pieces, framing="chunked"))
                with self.subTest(name, cut=cut):
                    stream = client.stream("x")
                    self.assertEqual(list(stream), texts)
                    whole = stream.completion()
                    self.assertEqual(whole.text, "".join(texts))
                    self.assertEqual(whole, client.stream("x").completion())
                    used = [c.usage for c in client.stream("x").chunks() if c.usage]
                    self.assertEqual(whole.usage, used[-1] if used else {})

    def test_the_documented_stream(self):
        parts = [" ", " Hi", "!", "", "</s>"]
        chunks = [*map(delta, parts), END]
        client = self.client_of(sse(*chunks))
        self.assertEqual(list(client.stream("Hello!")), [" ", " Hi", "!"])
        self.assertEqual(list(client.stream("Hello!").chunks()), chunks)
        expected = completion("  Hi!")
        del expected["usage"]
        self.assertEqual(client.stream("Hello!").completion(), expected)

    def test_whatever_the_server_sends_is_merged(self):
        def chunk(finish=None, logprobs=None, **message):
            choice = {"index": 0, "delta": message, "finish_reason": finish}
            return {**END, "choices": [{**choice, "logprobs": logprobs}]}

        call = {"index": 0, "id": "1", "type": "function"}
        tokens = [{"token": "a"}, {"token": "b"}]
        datas = [
            chunk(role="assistant", content=None, reasoning_content="th"),
            chunk(reasoning_content="ink", refusal="no"),
            chunk(content="a", logprobs={"content": tokens[:1]}),
            chunk(content="b", logprobs={"content": tokens[1:]}, name=""),
            chunk(tool_calls=[{**call, "function": {"name": "f", "arguments": ""}}]),
            chunk(tool_calls=[{"index": 0, "id": "", "function": {"arguments": "{"}}]),
            chunk(tool_calls=[{"index": 1, "id": "2"}]),
            chunk(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]),
            chunk(tool_calls=[{"id": "3"}, {"id": "4"}]),
            chunk(finish="tool_calls"),
        ]
        whole = (
            self.client_of(sse(*datas, {"system_fingerprint": "f"}))
            .stream("x")
            .completion()
        )
        self.assertEqual(
            whole["choices"],
            [
                {
                    "index": 0,
                    "finish_reason": "tool_calls",
                    "logprobs": {"content": tokens},
                    "message": {
                        "role": "assistant",
                        "content": "ab",
                        "reasoning_content": "think",
                        "refusal": "no",
                        "name": "",
                        "tool_calls": [CALL, {"id": "2"}, {"id": "3"}, {"id": "4"}],
                    },
                }
            ],
        )
        self.assertEqual(whole["system_fingerprint"], "f")

    def test_chat_equals_stream(self):
        calls = completion(None, "tool_calls")
        calls["choices"][0]["message"]["tool_calls"] = [CALL]
        call_chunk = {**END, "choices": [{"index": 0, "delta": {**CALLS}}]}
        call_chunk["choices"][0]["delta"]["tool_calls"] = [{"index": 0, **CALL}]
        for name, whole, chunks in (
            ("text", completion("a b"), [delta("a"), delta(" b")]),
            ("length", completion("a", "length"), [delta("a")]),
            ("calls", calls, [call_chunk]),
        ):
            reason = whole["choices"][0]["finish_reason"]
            end = delta(finish=reason, usage=USAGE)
            client = self.client_of(answer(json.dumps(whole)), sse(*chunks, end))
            with self.subTest(name):
                self.assertEqual(client.chat("x"), whole)
                self.assertEqual(client.stream("x").completion(), whole)

    def test_a_json_reply_to_a_streamed_request(self):
        text = json.dumps(completion("one piece"), indent=2)
        plain = {"Content-Type": "application/json"}
        for name, raw, headers in (
            ("documented", text, plain),
            ("white space first", f"\n\n  {text}", plain),
            ("no type", text, {}),
            ("no type, white space", f"\r\n\r\n{text}", {}),
            ("BOM", f"\ufeff{text}", {}),
        ):
            raw = raw.encode()
            for pieces in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
                one = answer(*pieces, headers=headers, framing="chunked")
                client = self.client_of(one)
                with self.subTest(name, pieces=len(pieces)):
                    self.assertEqual(list(client.stream("x")), ["one piece"])
                    whole = client.stream("x").completion()
                    self.assertEqual(whole, completion("one piece"))

    def test_the_ways_to_stop_too_early(self):
        datas = [delta("a"), delta("b")]
        for end, framing in (
            ("clean", "close"),
            ("clean", "chunked"),
            ("short", "length"),
            ("short", "chunked"),
            ("reset", "chunked"),
            ("stall", "chunked"),
        ):
            broken = sse(*datas, done=False, framing=framing, end=end)
            client = self.client_of(broken, timeout=0.15)
            for read in (list, nemotron.Stream.completion, lambda s: list(s.chunks())):
                with self.subTest(end, framing=framing, read=read):
                    stream = client.stream("x")
                    with self.assertRaises(nemotron.IncompleteReplyError) as caught:
                        read(stream)
                    self.assertEqual(caught.exception.partial.text, "ab")
                    self.assertIsInstance(caught.exception.__cause__, Exception)
                    for again in (list, nemotron.Stream.completion):
                        with self.assertRaises(nemotron.IncompleteReplyError) as second:
                            again(stream)
                        self.assertIs(second.exception, caught.exception)

    def test_every_place_to_stop(self):
        raw = b"".join(sse(delta("a"), END).pieces)
        ended = raw.index(b'"stop"}]}') + len(b'"stop"}]}')
        server = self.serve(
            lambda r: answer(raw[: int(r.json["user"])], framing="close")
        )
        client = server.client()
        for place in range(0, len(raw), 5):
            with self.subTest(place):
                if place >= ended:
                    whole = client.stream("x", user=str(place)).completion()
                    self.assertEqual(whole.text, "a")
                else:
                    with self.assertRaises(nemotron.IncompleteReplyError):
                        client.stream("x", user=str(place)).completion()

    def test_nothing_after_the_end_can_spoil_it(self):
        with mock.patch.object(nemotron, "GRACE", 0.2):
            for end in ("clean", "short", "reset", "stall"):
                client = self.client_of(sse(delta("a", "stop"), done=False, end=end))
                with self.subTest(end):
                    self.assertEqual(client.stream("x").completion().text, "a")

    def test_the_wait_after_the_end_is_bounded_in_all(self):
        pings = sse(delta("a", "stop"), *[": ping"] * 100, done=False, end="stall")
        client = self.client_of(pings, timeout=600)
        client._clock = itertools.count().__next__  # each look is a second later
        self.assertEqual(client.stream("x").completion().text, "a")
        self.assertLess(client._clock(), 20)

    def test_errors_inside(self):
        for name, (datas, expected) in BROKEN.items():
            client = self.client_of(sse(delta("a"), *datas))
            with self.subTest(name):
                with self.assertRaises(nemotron.ReplyError) as caught:
                    list(client.stream("x"))
                error = caught.exception
                self.assertIs(type(error), nemotron.ReplyError)
                self.assertIn(expected, str(error))
                self.assertLessEqual(len(str(error)), 300)
                self.assertEqual((error.partial.text, error.status_code), ("a", 200))
        for name, raw, expected in (
            ("event: error", b"event: error\ndata: Boom\n\n", "Boom"),
            ("torn", b"event: error\ndata: Boom", "Boom"),
            ("with JSON", b'event: error\ndata: {"message": "Boom"}\n\n', "Boom"),
            ("[DONE] alone", b"data: [DONE]\n\n", "without a reply"),
            ("plain error", b'{"error": {"message": "Boom"}}', "Boom"),
            ("HTML", b"<html><body>Log in</body></html>", "odd chunk"),
            ("no choices", b'{"choices": []}', "without a reply"),
        ):
            client = self.client_of(answer(raw))
            with self.subTest(name), self.assertRaises(nemotron.ReplyError) as caught:
                client.stream("x").completion()
            self.assertIs(type(caught.exception), nemotron.ReplyError)
            self.assertIn(expected, str(caught.exception))

    def test_too_large(self):
        with mock.patch.object(nemotron, "MAX_BYTES", 1 << 20):
            for name, piece in (
                ("a line", b"x" * 65536),
                ("lines", b"data: xxxxxxx\n" * 4096),
                ("lines without a colon", b"data\n" * 9999),
                ("white space", b" " * 65536),
            ):
                client = self.client_of(answer(*[piece] * 40, framing="close"))
                for call in ("chat", "stream"):
                    with self.subTest(name, call=call):
                        with self.assertRaisesRegex(nemotron.ReplyError, "over 1 MiB"):
                            list(getattr(client, call)("x"))
            events = [delta("x" * 100)] * 20000  # 4 MiB, but none of them is too large
            client = self.client_of(sse(*events, END, framing="close"))
            self.assertEqual(len(client.stream("x").completion().text), 2000000)

    def test_compressed(self):
        zipped = answer(b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
        for call in ("chat", "stream"):
            with self.assertRaisesRegex(nemotron.ReplyError, "compressed .gzip."):
                getattr(self.client_of(zipped), call)("x")

    def test_a_piece_is_delivered_while_the_server_is_silent(self):
        client = self.client_of(sse(delta("a"), done=False, end="stall"))
        with client.stream("x") as stream:
            self.assertEqual(next(stream), "a")

    def test_reading_in_several_ways(self):
        client = self.client_of(sse(delta("a"), delta("b"), delta("c"), END))
        with client.stream("x") as stream:
            self.assertEqual(next(stream), "a")
            self.assertEqual(next(stream.chunks()).text, "b")
            for text in stream:
                self.assertEqual(text, "c")
                break
            self.assertEqual(stream.completion().text, "abc")
        with client.stream("x") as stream:
            next(stream)
        self.assertEqual(list(stream), [])
        with self.assertRaisesRegex(nemotron.IncompleteReplyError, "closed") as caught:
            stream.completion()
        self.assertEqual(caught.exception.partial.text, "a")

    def test_n_is_for_blocking_calls(self):
        client = self.client_of(reply())
        self.refused(client.stream, "x", n=2)
        self.refused(client.stream, "x", extra={"n": 2})
        self.assertEqual(client.chat("x", n=2).text, "ok")


# -------------------------------------------------------------------------- Failures

# (body, the server's words in the error), as they are seen in the wild.
ERROR_BODIES = (
    ({"detail": {"error": "Not authenticated"}}, "Not authenticated"),
    ({"error": {"message": "Model busy, retry later"}}, "Model busy, retry later"),
    ({"error": {"message": "No such model", "code": 404}}, "No such model"),
    ({"error": "just text"}, "just text"),
    ({"detail": "some detail"}, "some detail"),
    ({"detail": [{"loc": ["body"], "msg": "too high"}]}, "too high"),
    ({"object": "error", "message": "from vLLM"}, "from vLLM"),
    ({"title": "Gone", "status": 410, "detail": "retired in May"}, "retired in May"),
    ({"error": True, "message": "a flag"}, "a flag"),
    ({"error": {"message": 5}}, "Reason"),
    ("Rate limited", "Rate limited"),
    ("<html><head><title>502</title></head>", "Reason"),
    ("", "Reason"),
    ("[" * 100000, "[[["),
    ('{"error": ' * 700 + "1" + "}" * 700, "HTTP 400"),
    (b"\xff\xfe", "\ufffd"),
    ("x" * 3000000, "xxx"),
)
STATUS_CLASSES = {
    400: "APIStatusError",
    401: "AuthenticationError",
    402: "AuthenticationError",
    403: "AuthenticationError",
    404: "APIStatusError",
    422: "APIStatusError",
    429: "RateLimitError",
    500: "APIStatusError",
    503: "RateLimitError",
    204: "APIStatusError",
    103: "APIStatusError",
}


class FailureTests(Case):
    def test_error_bodies(self):
        for body, expected in ERROR_BODIES:
            raw = body if isinstance(body, (str, bytes)) else json.dumps(body)
            client = self.serve(answer(raw, status=400)).client()
            with self.subTest(expected):
                with self.assertRaises(nemotron.APIStatusError) as caught:
                    client.chat("x")
                message = str(caught.exception)
                self.assertIn(expected, message)
                self.assertTrue(message.startswith("HTTP 400 "))
                self.assertLessEqual(len(message.splitlines()[0]), 300)
                self.assertEqual(len(message.splitlines()), 1)

    def test_statuses(self):
        for status, name in STATUS_CLASSES.items():
            headers = {"x-request-id": "r1", "Retry-After": "7"}
            server = self.serve(
                answer('{"error": "x"}', status=status, headers=headers)
            )
            client = server.client(retries=0)
            for call in (client.chat, client.stream):
                with self.subTest(status):
                    with self.assertRaises(nemotron.NemotronError) as caught:
                        call("x")
                    error = caught.exception
                    seen = (error.status_code, error.request_id, error.retry_after)
                    self.assertEqual(seen, (status, "r1", 7.0))
                    self.assertEqual(type(error).__name__, name)
                    if status not in (103, 204):  # these have no body
                        self.assertEqual(error.body, {"error": "x"})
                    self.assertIn(server.url + "/chat/completions", str(error))

    def test_an_overrun_of_the_context_is_not_retried(self):
        for status, message in (
            (400, "This model's maximum context length is 4096 tokens"),
            (500, "Requested input length 5000 exceeds 4096"),
        ):
            server = self.serve(answer(message, status=status))
            with self.subTest(status):
                with self.assertRaisesRegex(nemotron.APIStatusError, "4,096.*shorten"):
                    server.client().chat("x")
                self.assertEqual(len(server.requests), 1)

    def test_retries_and_then_success(self):
        for status in (408, 409, 429, 500, 502, 503, 504, None, "empty"):
            bad = status and answer("busy", status=status)
            bad = answer("") if status == "empty" else bad
            server = self.serve(bad, bad, reply())
            client = server.client()
            with self.subTest(status):
                self.logged.clear()
                self.assertEqual(client.chat("x").text, "ok")
                self.assertEqual(len(server.requests), 3)
                first, second = client.slept
                self.assertTrue(0.375 <= first <= 0.5 and 0.75 <= second <= 1)
                self.assertEqual(len(self.logged), 2)
                self.assertIn("retry 1 of 2 in ", self.logged[0])

    def test_retries_come_to_an_end(self):
        server = self.serve(answer("busy", status=503))
        client = server.client(retries=7)
        with self.assertRaises(nemotron.RateLimitError):
            client.chat("x")
        self.assertEqual(len(server.requests), 8)
        for seconds, most in zip(client.slept, (0.5, 1, 2, 4, 8, 8, 8)):
            self.assertTrue(0.75 * most <= seconds <= most)

    def test_other_statuses_are_not_retried(self):
        for status in (400, 401, 402, 403, 404, 410, 422, 501, 302):
            server = self.serve(answer("no", status=status), reply())
            with self.subTest(status), self.assertRaises(nemotron.APIStatusError):
                server.client().chat("x")
            self.assertEqual(len(server.requests), 1)

    def test_retry_after(self):
        def date(seconds):
            moment = time.gmtime(time.time() + seconds)
            return time.strftime("%a, %d %b %Y %H:%M:%S GMT", moment)

        for value, low, high in (
            ("7", 7, 7),
            ("0.5", 0.5, 0.5),
            (date(100), 40, 100),
            ("120", 120, 120),
            ("soon", 0.375, 0.5),
            ("nan", 0.375, 0.5),
            ("121", None, None),
            (date(500), None, None),
            ("inf", None, None),
        ):
            busy = answer("busy", status=429, headers={"Retry-After": value})
            server = self.serve(busy, reply())
            client = server.client()
            with self.subTest(value):
                if low is None:
                    with self.assertRaises(nemotron.RateLimitError):
                        client.chat("x")
                    self.assertEqual((client.slept, len(server.requests)), ([], 1))
                else:
                    self.assertEqual(client.chat("x").text, "ok")
                    (seconds,) = client.slept
                    self.assertTrue(low <= seconds <= high, seconds)

    def test_a_blocking_call_is_retried_until_its_body_is_read(self):
        whole = json.dumps(completion())
        for end in ("short", "reset", "stall"):
            server = self.serve(
                answer(whole[:50], end=end, framing="chunked"),
                answer(whole[:50], end=end),
                reply(),
            )
            with self.subTest(end):
                self.assertEqual(server.client(timeout=0.2).chat("x").text, "ok")
        server = self.serve(answer(whole[:50], end="short"))
        with self.assertRaises(nemotron.APIConnectionError) as caught:
            server.client().chat("x")
        self.assertEqual((len(server.requests), caught.exception.status_code), (3, 200))

    def test_a_stream_is_not_retried_after_its_200(self):
        server = self.serve(sse(delta("a"), done=False, end="reset"), sse(END))
        with self.assertRaises(nemotron.IncompleteReplyError):
            server.client().stream("x").completion()
        self.assertEqual(len(server.requests), 1)

    def test_not_a_reply(self):
        for name, text in (
            ("HTML", "<title>Login</title>"),
            ("text", "ok"),
            ("list", "[]"),
            ("no choices", '{"choices": []}'),
            ("{}", "{}"),
            ("error", '{"error": {"message": "Boom"}}'),
            ("error in a choice", '{"choices": [{"error": "Boom", "message": {}}]}'),
            ("deep", "[" * 100000),
            ("null", '{"choices": null}'),
            ("no message", '{"choices": [{}]}'),
            ("odd choice", '{"choices": [5]}'),
            ("odd content", json.dumps(completion(5))),
            ("number", "1" * 6000),
        ):
            server = self.serve(answer(text))
            with self.subTest(name), self.assertRaises(nemotron.ReplyError) as caught:
                server.client().chat("x")
            error = caught.exception
            self.assertEqual((len(server.requests), error.partial), (1, {}))
            self.assertEqual(error.status_code, 200)

    def test_redirects_are_errors(self):
        other = self.serve(reply())
        for status in (301, 302, 303, 307, 308):
            location = {"Location": other.url}
            client = self.serve(answer("", status=status, headers=location)).client()
            for call in (client.chat, client.stream):
                with self.subTest(status):
                    with self.assertRaisesRegex(nemotron.APIStatusError, "redirects"):
                        call("x")
        self.assertEqual(other.requests, [])

    def test_timeout(self):
        mute = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(mute.close)
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        client = nemotron.Client(base_url=url, timeout=0.1, retries=1)
        client._sleep = lambda seconds: None
        for call in (client.chat, client.stream):
            with self.assertRaises(nemotron.APITimeoutError):
                call("x")
        self.assertEqual(len(self.logged), 2)

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as gone:
            port = gone.getsockname()[1]
        client = nemotron.Client(base_url=f"http://127.0.0.1:{port}")
        client._sleep = lambda seconds: None
        with self.assertRaisesRegex(nemotron.APIConnectionError, f":{port}") as caught:
            client.chat("x")
        self.assertIsInstance(caught.exception.__cause__, ConnectionRefusedError)
        self.assertEqual(len(self.logged), 2)

    def test_an_unknown_host_is_not_retried(self):
        client = nemotron.Client(token="t", base_url="https://host.invalid")
        client._sleep = self.fail
        with self.assertRaises(nemotron.APIConnectionError) as caught:
            client.chat("x")
        if caught.exception.__cause__.errno == socket.EAI_AGAIN:
            self.skipTest("no name server answers here")

    def test_deadline(self):
        def client_of(one, deadline):
            """A client for which each look at the clock is a second later."""
            client = self.serve(one).client(deadline=deadline, timeout=600)
            client._clock = itertools.count().__next__
            return client

        drip = answer(*[b" "] * 50, framing="chunked", end="stall")
        with self.assertRaisesRegex(nemotron.APITimeoutError, "deadline of 9 s"):
            client_of(drip, 9).chat("x")
        drip = sse(*[delta("a")] * 50, done=False, end="stall")
        with self.assertRaisesRegex(nemotron.IncompleteReplyError, "of 9 s") as caught:
            client_of(drip, 9).stream("x").completion()
        self.assertTrue(1 <= len(caught.exception.partial.text) < 9)
        client = client_of(answer("", status=429, headers={"Retry-After": "20"}), 15)
        with self.assertRaises(nemotron.RateLimitError):
            client.chat("x")
        self.assertEqual(client.slept, [])
        silent = self.serve(answer(end="stall", framing="close"))
        with self.assertRaises(nemotron.APITimeoutError):
            silent.client(timeout=600, deadline=0.3).chat("x")


# -------------------------------------------------------------------------- Settings

BAD_BASE_URLS = """
api.example.com ftp://x/v1 file:///etc/passwd http://example.com/v1 https://
http://127.0.0.1.example.com http://localhost.example.com https://user:secret@x/
https://x/?a=b https://x/#a https://x:port/ http://10.0.0.1/ http://127.0.0.999
http://127.0.0.01 http://127.1 http://[::1].evil.com http://[::2] https://x\\@evil.com
http://localhost@evil.com https://\u00e9.com
""".split()


class SettingsTests(Case):
    def test_bad_settings(self):
        urls = [
            {"base_url": url}
            for url in (*BAD_BASE_URLS, "https://x\r\n/", "https://a b/", 5)
        ]
        for setting in (
            *urls,
            {"timeout": 0},
            {"timeout": "5"},
            {"timeout": float("inf")},
            {"deadline": -1},
            {"retries": -1},
            {"retries": 1.5},
            {"model": 5},
            {"token": 5},
        ):
            with self.subTest(setting):
                self.assertNotIn("secret", self.refused(nemotron.Client, **setting))

    def test_good_base_urls(self):
        for url in (
            "http://localhost:8000/v1",
            "http://127.0.0.1/",
            "http://127.255.0.9:1",
            "http://[::1]:80/v1",
            "https://api.example.com:8443/a/b",
            "HTTPS://API.example.com",
        ):
            with self.subTest(url):
                self.assertEqual(nemotron.Client(base_url=url).base_url, url)

    def test_environment(self):
        server = self.serve(reply())
        os.environ["DEEPINFRA_BASE_URL"] = server.url
        os.environ["NEMOTRON_MODEL"] = "m2"
        for variables, expected in (
            ({"DEEPINFRA_TOKEN": " one\n", "DEEPINFRA_API_KEY": "two"}, "Bearer one"),
            ({"DEEPINFRA_TOKEN": " ", "DEEPINFRA_API_KEY": "two"}, "Bearer two"),
            ({"DEEPINFRA_TOKEN": "", "DEEPINFRA_API_TOKEN": "three"}, "Bearer three"),
            ({"DEEPINFRA_TOKEN": ""}, None),
        ):
            with self.subTest(variables), mock.patch.dict(os.environ, variables):
                nemotron.chat("x")
                request = server.requests[-1]
                self.assertEqual(request.headers.get("authorization"), expected)
                self.assertEqual(request.json["model"], "m2")
        self.assertEqual(nemotron.chat("x", model="m3").text, "ok")
        self.assertEqual(server.requests[-1].json["model"], "m3")

    def test_no_token_and_bad_tokens(self):
        for token in (None, "", " ", "a\nb", "caf\u00e9", "a\x7fb"):
            client = nemotron.Client(token=token)
            for call in (client.chat, client.stream, client.batch):
                with self.subTest(token, call=call.__name__):
                    with self.assertRaises(nemotron.AuthenticationError) as caught:
                        call("x")
                    self.assertIsNone(caught.exception.status_code)
                    self.assertNotIn("caf", str(caught.exception))

    def test_the_token_is_in_no_diagnostic(self):
        escaped = json.dumps(TOKEN)[1:-1].replace("/", "\\/")
        unicode = "".join(f"\\u{ord(character):04x}" for character in TOKEN)
        for name, what in (
            ("body", answer(f'{{"error": "bad key {TOKEN}"}}', status=400)),
            ("body, escaped", answer(f'{{"error": "bad {escaped}"}}', status=400)),
            ("body, as Unicode", answer(f'{{"error": "bad {unicode}"}}', status=400)),
            ("key", answer(f'{{"{TOKEN}": 1}}', status=400)),
            ("text", answer(f"{'x' * 200} {TOKEN}", status=500)),
            ("cut", answer(f"{TOKEN} " * 50 + TOKEN, status=500)),
            ("not JSON", answer(f"your {TOKEN}!")),
            ("error", answer(json.dumps({"error": TOKEN}))),
            ("encoding", answer("x", headers={"Content-Encoding": TOKEN * 20})),
            ("location", answer("", status=302, headers={"Location": TOKEN})),
            ("request", answer("", status=400, headers={"x-request-id": TOKEN})),
            ("status line", answer("", status=f"x {TOKEN}")),
            ("stream", sse(delta("a"), {"error": TOKEN})),
            ("stream not JSON", sse(f"{{ {escaped}")),
        ):
            client = self.serve(what).client(retries=1)
            for call in (client.chat, client.stream):
                with self.subTest(name, call=call.__name__):
                    with self.assertRaises(nemotron.NemotronError) as caught:
                        list(call("x"))
                    error = caught.exception
                    while error is not None:
                        shown = [str(error), repr(error), repr(error.args)]
                        shown.append(repr(getattr(error, "body", "")))
                        shown.append(repr(getattr(error, "request_id", "")))
                        self.assertNotIn(TOKEN[:10], "".join(shown))
                        error = error.__cause__
            (row,) = client.batch(["x"]) if name.startswith(("body", "key")) else [{}]
            self.assertNotIn(TOKEN[:10], json.dumps(row))
        self.assertNotIn(TOKEN[:10], "".join(self.logged))
        self.assertNotIn(TOKEN, repr(nemotron.Client(token=TOKEN)))

    def test_proxies(self):
        proxy, server = self.serve(answer("", status=407)), self.serve(reply())
        address = f"http://127.0.0.1:{proxy.port}"
        os.environ.update(http_proxy=address, https_proxy=address)
        self.assertEqual(server.client().chat("x").text, "ok")
        self.assertEqual(proxy.requests, [])
        client = nemotron.Client(token=TOKEN, base_url="https://x.invalid", retries=0)
        with self.assertRaisesRegex(nemotron.APIConnectionError, "407"):
            client.chat("x")
        (request,) = proxy.requests
        self.assertEqual((request.method, request.path), ("CONNECT", "x.invalid:443"))
        self.assertNotIn("authorization", request.headers)

    def test_without_ssl(self):
        code = (
            "import sys; sys.modules['ssl'] = sys.modules['_ssl'] = None; import nemotron;"
            "sys.exit(nemotron.main(['-n', *sys.argv[1:]]))"
        )

        def run(*args):
            command = [sys.executable, "-c", code, *args]
            env = environment(DEEPINFRA_TOKEN="x")
            return subprocess.run(command, cwd=HERE, env=env, capture_output=True)

        done = run("x")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, rb"^nemotron: [^\n]*ssl module[^\n]*\n$")
        self.assertEqual(run("--offline", "x").stdout, b"x\n")


@unittest.skipUnless(shutil.which("openssl"), "openssl")
class CertificateTests(Case):
    def serve_tls(self, *answers):
        try:
            import ssl
        except ImportError:
            self.skipTest("ssl")
        files = [self.folder / "certificate.pem", self.folder / "key.pem"]
        command = (
            "openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=x -addext"
        )
        command = [*command.split(), "subjectAltName=IP:127.0.0.1", "-out", files[0]]
        subprocess.run([*command, "-keyout", files[1]], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*files)
        server = self.serve(*answers)
        server.tls = context
        server.url = server.url.replace("http:", "https:")
        return server

    def test_certificates(self):
        broken = sse(delta("a"), done=False, end="reset")
        server = self.serve_tls(reply(), sse(delta("a"), END), broken, reply())
        with self.assertRaisesRegex(nemotron.APIConnectionError, "SSL_CERT_FILE"):
            server.client().chat("x")
        self.assertEqual((server.requests, self.logged), ([], []))
        os.environ["SSL_CERT_FILE"] = str(self.folder / "certificate.pem")
        client = server.client()
        self.assertEqual(client.chat("x").text, "ok")
        self.assertEqual(client.stream("x").completion().text, "a")
        with self.assertRaises(nemotron.IncompleteReplyError):
            client.stream("x").completion()
        self.assertEqual(server.client(deadline=60).chat("x").text, "ok")
        self.assertEqual([row["error"] for row in client.batch("abc")], [None] * 3)


class OfflineTests(Case):
    def test_blocking_and_streamed(self):
        os.environ.update(DEEPINFRA_TOKEN="x\ny", DEEPINFRA_BASE_URL="nonsense")
        with nemotron.offline() as client:
            for text in (
                "Hello!",
                "two  words\n and more\n",
                " ",
                "",
                "\u20ac </s> x",
                "</s>",
            ):
                messages = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": text}]
                whole = client.chat(messages)
                streamed = client.stream(messages).completion()
                for one in (whole, streamed):
                    with self.subTest(text):
                        self.assertEqual((one.text, one.finish_reason), (text, "stop"))
                        used = {**one.usage}
                        total = used["prompt_tokens"] + used["completion_tokens"]
                        self.assertEqual(used["total_tokens"], total)
                        del one["id"], one["created"]
                self.assertEqual(streamed, whole)
            self.assertEqual(len(client.chat("x", n=3)["choices"]), 3)
            parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
            self.assertEqual(
                client.chat([{"role": "user", "content": parts}]).text, "ab"
            )


# ----------------------------------------------------------------------------- Batch

# Each form of a request, and what is in its body beside the model and the message "u".
FORMS = {
    "text": ("u", {}),
    "a prompt": ({"prompt": "u", "custom_id": "x", "seed": 1}, {"seed": 1}),
    "a prompt and system": (
        {"prompt": "u", "system": "s"},
        {"messages": [SYSTEM, USER]},
    ),
    "a body": ({"messages": [USER], "top_k": 5, "x": 1}, {"top_k": 5, "x": 1}),
    "a streamed body": (
        {"messages": [USER], "stream": True, "stream_options": {}, "model": "z"},
        {"model": "z"},
    ),
    "a batch line": (
        {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/openai/chat/completions",
            "body": {"messages": [USER], "seed": None},
        },
        {},
    ),
}
BAD_FORMS = (
    5,
    None,
    [USER],
    {},
    {"prompt": "u", "messages": [USER]},
    {"prompt": 5},
    {"prompt": "u", "top_p": 0},
    {"body": []},
    {"url": "/v1/embeddings", "body": {"messages": [USER]}},
    {"method": "GET", "body": {"messages": [USER]}},
    {"custom_id": 5, "prompt": "u"},
    {"messages": 5},
    {"prompt": "u", "x": float("nan")},
)


class BatchTests(Case):
    def setUp(self):
        super().setUp()
        self.output = str(self.folder / "rows.jsonl")

    def rows(self):
        with open(self.output, "rb") as file:
            return [json.loads(line) for line in file]

    def test_forms(self):
        server = self.serve(echo)
        for name, (form, expected) in FORMS.items():
            with self.subTest(name):
                before = json.dumps(form)
                (row,) = server.client(model="m").batch([form])
                body = {"model": "m", "messages": [USER], **expected}
                self.assertEqual(
                    (row["request"], server.requests[-1].json), (body, body)
                )
                self.assertEqual(json.dumps(form), before)
        sent = len(server.requests)
        for form in BAD_FORMS:
            with self.subTest(form):
                (row,) = server.client().batch([form])
                self.assertEqual(row["error"]["code"], "invalid_request")
                seen = (row["custom_id"], row["request"], row["response"])
                self.assertEqual(seen, ("line-1", None, None))
        self.assertEqual(len(server.requests), sent)

    def test_defaults(self):
        own = {"role": "system", "content": "own"}
        defaults = {"system": "s", "seed": 1, "extra": {"a": 1, "b": 1, "top_k": 7}}
        for request, expected in (
            (
                {"prompt": "u", "seed": 2, "b": 2},
                {"seed": 2, "a": 1, "b": 2, "top_k": 7},
            ),
            ({"prompt": "u", "top_k": 3}, {"seed": 1, "a": 1, "b": 1, "top_k": 3}),
        ):
            (row,) = self.serve(echo).client(model="m").batch([request], **defaults)
            body = {"model": "m", "messages": [SYSTEM, USER], **expected}
            self.assertEqual(row["request"], body)
        (row,) = (
            self.serve(echo).client().batch([{"messages": [own, USER]}], system="s")
        )
        self.assertEqual(row["request"]["messages"], [own, USER])

    def test_rows(self):
        special = {
            "bad": answer('{"error": "no"}', status=422, headers={"x-request-id": "r"}),
            "html": answer("<title>x</title>"),
            "cut": answer("{", end="short"),
            "zip": answer("x", headers={"Content-Encoding": "gzip"}),
            "deep": answer("[" * 3000 + "]" * 3000),
            "gone": None,
        }
        server = self.serve(lambda r: special.get(last_text(r), echo(r)))
        requests = [
            "a",
            {"custom_id": "b", "prompt": "B"},
            {"custom_id": "b", "prompt": "c"},
        ]
        requests += [*special, {"custom_id": "line-11", "prompt": "taken"}, "j"]
        rows = list(server.client(retries=0).batch(iter(requests), jobs=1))
        keys = ["id", "custom_id", "request", "response", "error"]
        self.assertEqual([list(row) for row in rows], [keys] * len(requests))
        self.assertEqual(
            [(row["custom_id"], (row["error"] or {}).get("code")) for row in rows],
            [
                ("line-1", None),
                ("b", None),
                ("b", "duplicate_custom_id"),
                ("line-4", "api_status"),
                ("line-5", "reply"),
                ("line-6", "connection"),
                ("line-7", "reply"),
                ("line-8", "reply"),
                ("line-9", "connection"),
                ("line-11", None),
                ("line-11", "duplicate_custom_id"),
            ],
        )
        bodies = [row["response"] for row in rows]
        self.assertEqual(bodies[0]["body"], completion("a"))
        failed = {"status_code": 422, "request_id": "r", "body": {"error": "no"}}
        self.assertEqual(bodies[3], failed)
        self.assertEqual(
            [b and b["status_code"] for b in bodies[4:9]], [200] * 4 + [None]
        )
        self.assertEqual(len({row["id"] for row in rows}), len(rows))

    def test_a_deep_reply_gives_a_row_that_can_be_read_back(self):
        for depth in (100, 450, 900, 950, 980, 990, 3000):
            deep = (
                json.dumps(completion())[:-1]
                + ', "x": '
                + "[" * depth
                + "]" * depth
                + "}"
            )
            client = self.serve(answer(deep)).client()
            with self.subTest(depth):
                (row,) = client.batch("a", output=self.output)
                self.assertEqual(row["response"]["status_code"], 200)
                again = len(list(client.batch("a", output=self.output)))
                self.assertEqual(again, row["error"] is not None)
                os.unlink(self.output)

    def test_lazy_and_at_most_jobs_in_flight(self):
        server, taken = self.serve(echo), []

        def endless():
            for number in itertools.count():
                taken.append(number)
                yield str(number)

        rows = server.client().batch(endless(), jobs=5)
        self.assertEqual(taken, [])
        for _ in range(40):
            next(rows)
            self.assertLessEqual(len(taken), 40 + 5)
        rows.close()
        self.assertLessEqual(server.most_in_flight, 5)

    def test_rows_come_while_the_source_is_silent(self):
        go = threading.Event()
        self.addCleanup(go.set)

        def slow():
            yield from "ab"
            go.wait(60)
            yield "c"

        rows = self.serve(echo).client().batch(slow(), jobs=4)
        self.assertEqual({next(rows)["custom_id"] for _ in "ab"}, {"line-1", "line-2"})
        go.set()
        self.assertEqual([row["custom_id"] for row in rows], ["line-3"])

    def test_what_the_source_raises_comes_after_the_rows(self):
        def broken():
            yield from "ab"
            raise LookupError("of the caller")

        names = set()
        with self.assertRaisesRegex(LookupError, "of the caller"):
            for row in self.serve(echo).client().batch(broken(), jobs=2):
                names.add(row["custom_id"])
        self.assertEqual(names, {"line-1", "line-2"})

    def test_no_row_is_lost_between_taking_and_counting(self):
        reply_text = json.dumps(completion()).encode()

        class Opener:  # the network alone is replaced
            def open(self, request, timeout):
                sock = mock.Mock(makefile=lambda mode: io.BytesIO(head + reply_text))
                response = http.client.HTTPResponse(sock)
                response.begin()
                return response

        import http.client

        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(reply_text)
        client = nemotron.Client(token="t")
        client._opener = Opener()
        before = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, before)
        sys.setswitchinterval(1e-6)
        for _ in range(400):
            rows = list(client.batch("abc", jobs=3))
            self.assertEqual(len(rows), 3)
        self.assertEqual(rows[0]["error"], None)

    def test_rate_limits_lose_nothing(self):
        for headers in ({}, {"Retry-After": "0"}, {"Retry-After": "0.01"}):
            counter = itertools.count(1)  # only every fifth request is answered
            busy = answer("busy", status=429, headers=headers)
            server = self.serve(
                lambda r, b=busy, c=counter: b if next(c) % 5 else echo(r)
            )
            with (
                self.subTest(headers),
                mock.patch.multiple(nemotron.Batch, FIRST_PAUSE=0.001, MAX_PAUSE=0.01),
            ):
                self.logged.clear()
                rows = list(server.client(retries=0).batch("abcdefghijklmnop"))
                self.assertEqual([row["error"] for row in rows], [None] * 16)
                pauses = [line for line in self.logged if "all workers pause" in line]
                self.assertTrue(0 < len(pauses) == len(self.logged))

    def test_a_request_gives_up_after_its_timeout_of_pauses(self):
        for headers, sent in (
            ({"Retry-After": "31"}, 1),
            ({"Retry-After": "0.02"}, None),
        ):
            server = self.serve(answer("busy", status=503, headers=headers))
            timeout = 30 if sent else 0.1
            (row,) = server.client(timeout=timeout).batch(["a"])
            with self.subTest(headers):
                self.assertEqual(row["error"]["code"], "rate_limit")
                self.assertEqual(row["response"]["status_code"], 503)
                self.assertTrue(
                    len(server.requests) == sent or len(server.requests) > 3
                )
        server = self.serve(answer("", status=429, headers={"Retry-After": "25"}))
        (row,) = server.client(deadline=20).batch(["a"])
        self.assertEqual(
            (row["error"]["code"], len(server.requests)), ("rate_limit", 1)
        )

    def test_a_refused_token_ends_the_batch_and_loses_no_row(self):
        full, refused = threading.Semaphore(0), threading.Event()

        def refuse(request):
            if last_text(request) != "1":
                full.release()
                refused.wait(60)
                return echo(request)
            for _ in range(3):
                full.acquire(timeout=60)
            refused.set()
            return answer('{"detail": "no"}', status=401)

        server, rows = self.serve(refuse), []
        with self.assertRaises(nemotron.AuthenticationError):
            for row in server.client().batch(map(str, itertools.count()), jobs=4):
                rows.append(row)
        self.assertEqual(len(rows), len(server.requests))
        codes = [row["error"]["code"] for row in rows if row["error"]]
        self.assertEqual(codes, ["authentication"])

    def test_a_silent_source_does_not_hold_up_the_end(self):
        never = threading.Event()
        self.addCleanup(never.set)

        def source():
            yield "a"
            never.wait(60)

        server = self.serve(answer("no", status=403))
        with self.assertRaises(nemotron.AuthenticationError):
            list(server.client().batch(source(), jobs=3))
        self.assertFalse(never.is_set())

    def test_arguments_are_checked_at_once(self):
        client = self.serve(reply()).client()
        for jobs in (0, 201, 1.0, True, "8"):
            self.refused(client.batch, ["a"], jobs=jobs)
        self.refused(client.batch, ["a"], top_p=0)
        self.refused(client.batch, ["a"], temprature=1)
        self.assertEqual(list(client.batch([], jobs=200)), [])

    def test_output_is_a_checkpoint(self):
        server = self.serve(echo)
        named = [{"custom_id": str(i), "prompt": "same"} for i in range(4)]
        requests = ["same", *named, "same", "other"]

        def run(requests, **params):
            server.requests.clear()
            before = len(self.rows()) if os.path.exists(self.output) else 0
            rows = list(server.client().batch(requests, output=self.output, **params))
            self.assertEqual(len(self.rows()) - before, len(rows))
            return sorted(row["custom_id"] for row in rows), len(server.requests)

        self.assertEqual(run(requests)[1], 7)
        self.assertEqual(run(requests), ([], 0))
        self.assertEqual(run(reversed(requests)), ([], 0))
        self.assertEqual(run(["new", *requests]), (["line-1"], 1))
        self.assertEqual(run([*requests, "same"]), (["line-8"], 1))
        self.assertEqual(
            run([*requests, {"custom_id": "4", "prompt": "same"}]), (["4"], 1)
        )
        self.assertEqual(run([{"custom_id": "1", "prompt": "edited"}]), (["1"], 1))
        self.assertEqual(run(requests, temperature=0.5)[1], 7)
        self.assertEqual(run(requests, system="s")[1], 7)
        self.assertEqual(run(requests, model="z")[1], 7)
        self.assertEqual(run(requests, model="z"), ([], 0))

    def test_error_rows_are_sent_again(self):
        sick = {"b", "c"}
        bad = answer("no", status=400)
        server = self.serve(lambda r: bad if last_text(r) in sick else echo(r))
        client = server.client()
        self.assertEqual(len(list(client.batch("abcd", output=self.output))), 4)
        sick.clear()
        names = {row["custom_id"] for row in client.batch("abcd", output=self.output)}
        self.assertEqual(names, {"line-2", "line-3"})
        self.assertEqual(len(self.rows()), 6)

    def test_the_end_of_the_output(self):
        client = self.serve(echo).client()
        list(client.batch("a", output=self.output))
        row = pathlib.Path(self.output).read_bytes()
        for tail, sent in (
            (b"{", 1),
            (row[:25], 1),
            (row[:-2], 1),
            (row[:-1], 0),
            (row, 0),
        ):
            pathlib.Path(self.output).write_bytes(tail)
            with self.subTest(tail):
                self.assertEqual(len(list(client.batch("a", output=self.output))), sent)
                self.assertEqual([r["custom_id"] for r in self.rows()], ["line-1"])

    def test_what_is_not_a_checkpoint_is_refused_untouched(self):
        server = self.serve(reply())
        for text in (
            b"hello",
            b"hello\n",
            b'{"prompt": "x"}\n',
            b'{"a": 1}',
            b"\n",
            b'{"id": "other',
            b'{"id": "batch_req_1", "mine": 1}',
        ):
            pathlib.Path(self.output).write_bytes(text)
            with self.subTest(text):
                message = self.refused(server.client().batch, "a", output=self.output)
                self.assertIn("line 1 is not a row", message)
                self.assertEqual(pathlib.Path(self.output).read_bytes(), text)
        os.unlink(self.output)
        with open(self.output, "a+b") as source:
            self.refused(server.client().batch, source, output=self.output)
        for path in (self.folder, self.folder / "no" / "rows", "/dev/null"):
            self.refused(server.client().batch, "a", output=str(path))
        self.assertEqual(server.requests, [])

    @unittest.skipUnless(POSIX, "locks")
    def test_two_batches_on_one_output(self):
        client = self.serve(echo).client()
        first = client.batch("ab", output=self.output, jobs=1)
        next(first)
        message = self.refused(client.batch, "ab", output=self.output)
        self.assertIn("another run is writing to it", message)
        self.assertEqual(len(list(first)), 1)
        self.assertEqual(list(client.batch("ab", output=self.output)), [])


@unittest.skipUnless(POSIX, "signals, limits")
class BatchProgramTests(Case):
    def setUp(self):
        super().setUp()
        self.output, self.input = self.folder / "rows.jsonl", self.folder / "input"

    def rows(self):
        return [json.loads(line) for line in self.output.read_bytes().splitlines()]

    def command(self, server, *args):
        command = [sys.executable, HERE / "nemotron.py", "--batch", self.input]
        return [*command, "--base-url", server.url, *map(str, args)]

    def run_batch(self, server, *args, limit="", **kwargs):
        shell = f'{limit or ":"}; exec "$@"'
        done = subprocess.run(
            ["sh", "-c", shell, "sh", *self.command(server, *args)],
            env=environment(DEEPINFRA_TOKEN=TOKEN),
            capture_output=True,
            timeout=120,
            **kwargs,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def test_lines(self):
        lines = [
            "\ufeffplain {x}",
            "",
            '"one"',
            "{oops",
            "[1]",
            "  ",
            '{"prompt": "two"}\r',
        ]
        lines += [
            '{"custom_id": "x", "prompt": "three", "seed": 5}',
            '{"custom_id": "x"}',
        ]
        self.input.write_bytes("\n".join(lines).encode() + b'\n"\xff"')
        server = self.serve(echo)
        args = ["-s", "S", "-m", "M", "--seed", "7", "-o", "z", "[1]", "-j", "1"]
        status, out, err = self.run_batch(server, *args, "A", "{},", "{}!")
        self.assertEqual(status, 1)
        rows = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(
            [(row["custom_id"], (row["error"] or {}).get("code")) for row in rows],
            [
                ("line-1", None),
                ("line-3", None),
                ("line-4", "invalid_request"),
                ("line-5", "invalid_request"),
                ("line-7", None),
                ("x", None),
                ("x", "duplicate_custom_id"),
                ("line-10", "invalid_request"),
            ],
        )
        sent = [
            (last_text(request), request.json["seed"]) for request in server.requests
        ]
        texts = [
            ("A plain {x}, plain {x}!", 7),
            ("A one, one!", 7),
            ("two", 7),
            ("three", 5),
        ]
        self.assertEqual(sent, texts)
        body = server.requests[0].json
        self.assertEqual((body["model"], body["z"]), ("M", [1]))
        self.assertEqual(body["messages"][0], {"role": "system", "content": "S"})
        first, last = err.splitlines()
        self.assertIn("first failure, line-4: not a request", first)
        counts = "8 done, 4 failed (3 invalid_request, 1 duplicate_custom_id)"
        self.assertIn(counts, last)
        self.input.write_text("text\n")
        self.run_batch(server, "Translate this:")
        self.assertEqual(last_text(server.requests[-1]), "Translate this:\n\ntext")

    def test_what_dry_run_prints_is_a_request(self):
        server, lines = self.serve(echo), ""
        for word in ("a", "b"):
            lines += program("--dry-run", "-n", "-u", "--seed", "5", word)[1]
        self.assertEqual(lines.count('"stream": true, "seed": 5, "stream_options"'), 2)
        args = ["--batch", "-", "--base-url", server.url, "-o", "stream_options", "{}"]
        status, out, err = program(*args, stdin=lines.encode())
        self.assertEqual((status, len(out.splitlines())), (0, 2), err)
        self.assertEqual(set(server.requests[0].json), {"model", "messages", "seed"})

    def test_kill_9_again_and_again(self):
        names = [str(i) for i in range(60)]
        requests = [{"custom_id": name, "prompt": name} for name in names[:30]]
        self.input.write_text(
            "\n".join([*map(json.dumps, requests), *names[30:], "59"])
        )
        sent, steps = collections.Counter(), threading.Semaphore(0)

        def counted(request):
            sent[last_text(request)] += 1
            steps.release()
            return echo(request)

        server, known = self.serve(counted), {}
        for _ in range(4):
            process = subprocess.Popen(
                self.command(server, "-j", "4", "--output", self.output),
                env=environment(),
                stderr=subprocess.DEVNULL,
            )
            for _ in range(10):
                steps.acquire(timeout=60)
            written = self.output.read_bytes().splitlines(True)[:-1]
            process.kill()
            process.wait()
            answered = {json.loads(row)["custom_id"] for row in written}
            known = {name: sent[name] for name in answered}
        self.assertEqual(self.run_batch(server, "--output", self.output)[0], 0)
        texts = [row["request"]["messages"][0]["content"] for row in self.rows()]
        self.assertEqual(sorted(texts, key=int), [*names, "59"])
        self.assertEqual({name: sent[name] for name in known}, known)

    def test_a_full_disk_and_space_again(self):
        self.input.write_text("\n".join(map(str, range(40))))
        server = self.serve(echo)
        limit = "trap '' XFSZ; ulimit -f 8"  # blocks of 512 or 1024 bytes
        status, _, err = self.run_batch(server, "--output", self.output, limit=limit)
        self.assertEqual(status, 1)
        self.assertIn("rows.jsonl: File too large", err)
        self.assertEqual(self.run_batch(server, "--output", self.output)[0], 0)
        texts = [row["request"]["messages"][0]["content"] for row in self.rows()]
        self.assertEqual(sorted(texts, key=int), [str(i) for i in range(40)])

    def test_few_files(self):
        self.input.write_text("\n".join(map(str, range(100))))
        args = ["--output", self.output, "-j", "60"]
        status, _, err = self.run_batch(self.serve(echo), *args, limit="ulimit -n 16")
        self.assertEqual(status, 0, err)
        self.assertEqual(len(self.rows()), 100)

    def test_max_cost(self):
        self.input.write_text("\n".join("abcdefgh"))
        server = self.serve(echo)
        limit = ["--output", self.output, "-j", "1", "--max-cost"]
        status, _, err = self.run_batch(server, *limit, "0.75")
        self.assertEqual((status, len(server.requests)), (3, 3))
        self.assertIn("3 done", err)
        self.assertIn("stopped by --max-cost", err)
        status, _, err = self.run_batch(server, *limit, "1.25")
        self.assertEqual(status, 0, err)  # the last one reaches it, and none is left
        for usage in ({}, {"cost": -1}):
            server = self.serve(reply(usage=usage))
            status, _, err = self.run_batch(server, "-j", "1", "--max-cost", "9")
            self.assertEqual((status, len(server.requests)), (3, 1))
            self.assertIn("a reply names no cost", err)

    def test_statuses(self):
        self.input.write_text("a\nb\n")
        status, _, err = self.run_batch(self.serve(reply("x", "length")))
        self.assertEqual(status, 3)
        self.assertIn("2 not complete", err)
        status, out, err = self.run_batch(
            self.serve(answer("no", status=402)), "-j", "1"
        )
        self.assertEqual((status, len(out.splitlines())), (4, 1))
        self.input.write_text("x\n" * 100)
        dead = self.serve(answer("no", status=404))
        status, out, err = self.run_batch(dead, "-j", "1")
        self.assertEqual((status, len(dead.requests)), (1, 20))
        self.assertIn("20 failed (20 api_status)", err)
        self.assertIn("stopped by 20 failures in a row", err)
        for args in (["-j", "0"], ["--max-cost", "-1"], ["--temperature", "3"], ["-c", "x"],
                     ["-i"], ["--dry-run"], ["--output", self.input]):  # fmt: skip
            with self.subTest(args):
                self.assertEqual(self.run_batch(dead, *args)[0], 2)
        self.assertEqual(len(dead.requests), 20)

    def test_ctrl_c_writes_the_complete_rows(self):
        self.input.write_text("\n".join("abcdef"))
        gate = threading.Event()
        self.addCleanup(gate.set)

        def some(request):
            if last_text(request) > "c":
                gate.wait(60)
            return echo(request)

        server = self.serve(some)
        process = subprocess.Popen(
            self.command(server), env=environment(), stdout=-1, stderr=-1
        )
        rows = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out), (130, b""))
        self.assertEqual({r["custom_id"] for r in rows}, {"line-1", "line-2", "line-3"})
        self.assertRegex(err, rb"^nemotron: [23] done, 0 failed[^\n]*\n$")

    def test_head(self):
        self.input.write_text("\n".join(map(str, range(300))))
        server = self.serve(echo)
        process = subprocess.Popen(
            self.command(server), env=environment(), stdout=-1, stderr=-1
        )
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        self.assertEqual(process.wait(60), 141)
        self.assertRegex(err, rb"^nemotron: \d+ done, [^\n]*\n$")
        self.assertLess(len(server.requests), 300)


# ---------------------------------------------------------------------- Command line


class MainCase(Case):
    def setUp(self):
        super().setUp()
        self.server = self.serve(echo)
        self.env = {"DEEPINFRA_BASE_URL": self.server.url}

    def run_main(self, *args, url=None):
        """Call main() without standard input; return its status and what it wrote."""
        files = [io.TextIOWrapper(io.BytesIO()) for _ in range(2)]
        base_url = {"DEEPINFRA_BASE_URL": url or self.server.url}
        with (
            mock.patch.dict(os.environ, base_url),
            mock.patch.multiple(sys, stdout=files[0], stderr=files[1]),
        ):
            status = nemotron.main(["-n", *map(str, args)])
        return (status, *(file.buffer.getvalue().decode() for file in files))


class ProgramTests(MainCase):
    def test_prompt(self):
        for args, stdin, expected in (
            (["a", "b"], "", "a b"),
            (["a"], "text\n\n", "a\n\ntext"),
            ([], "\ufefftext\r\n", "text"),
            (["a", "-", "b", "c"], "text", "a\n\ntext\n\nb c"),
            (["-n", "a", "-"], "text", "a -"),
            (["--", "-x", "\u20ac"], "", "-x \u20ac"),
        ):
            with self.subTest(args, stdin=stdin):
                env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
                status, out, _ = program(
                    "--offline", *args, stdin=stdin.encode(), env=env
                )
                self.assertEqual((status, out), (0, expected + "\n"))

    def test_options(self):
        values = {"tool_choice": "auto", "user": "me", "stop": ["a", "b"]}
        args, expected = [], {}
        for name, kind, *_ in nemotron.PARAMETERS:
            if name not in ("n", "tools", "response_format"):
                value = values.get(name, 0.5 if kind == "a number" else 1)
                for one in value if isinstance(value, list) else [value]:
                    args += ["--" + name.replace("_", "-"), one]
                expected[name] = value
        file = self.folder / "tools.json"
        file.write_text('[{"type": "function"}]')
        more = ["-s", "S", "-m", "M", "-o", "n", "2", "-o", "x", "text", "-o", "tools"]
        status, out, _ = self.run_main("--dry-run", *args, *more, f"@{file}", "hello")
        messages = [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "hello"},
        ]
        expected.update(n=2, x="text", tools=[{"type": "function"}], stream=True)
        self.assertEqual(
            json.loads(out), {"model": "M", "messages": messages, **expected}
        )
        self.assertEqual((status, self.server.requests), (0, []))

    def test_usage_errors_send_nothing(self):
        for args in (
            ["--temperature", "3", "x"],
            ["--seed", "x", "x"],
            ["--temp", "1", "x"],
            ["--nonsense", "x"],
            ["-o", "messages", "[]", "x"],
            ["-o", "n", "2", "x"],
            ["-o", "tools", "@/no/such/file", "x"],
            ["--timeout", "0", "x"],
            ["--base-url", "http://example.com", "x"],
            ["--max-cost", "1", "x"],
            ["--output", "f", "x"],
            ["-i", "--dry-run"],
            ["--batch", "/no/such/file"],
            ["-c", self.folder, "x"],
            ["-c", "/no/such/folder/file", "x"],
            [],
        ):
            with self.subTest(args):
                status, out, err = self.run_main(*args)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err, r"\Anemotron: [^\n]{1,289}\n\Z")
        self.assertEqual(self.server.requests, [])

    def test_reply(self):
        for text, shown in (
            ("  \n hi\n\n", "hi\n"),
            ("a\n\n\nb", "a\n\n\nb\n"),
            ("", "\n"),
            ("\x1b[2J\u20ac\ud83d", "\x1b[2J\u20ac?\n"),
        ):
            for args in ([], ["--no-stream"]):
                pieces = [delta(piece) for piece in text]
                what = reply(text) if args else sse(*pieces, END)
                with self.subTest(text, args=args):
                    seen = self.run_main("x", *args, url=self.serve(what).url)
                    self.assertEqual(seen, (0, shown, ""))

    def test_json_and_usage(self):
        status, out, err = self.run_main("--json", "-u", "-m", "asked", "x")
        self.assertEqual((status, json.loads(out)), (0, completion("x")))
        self.assertRegex(
            err, r"^nemotron: 3 \+ 2 tokens, \$0\.25, \d+\.\d s, model m\n$"
        )
        self.run_main("-u", "x")
        asked = self.server.requests[-1].json["stream_options"]
        self.assertEqual(asked, {"include_usage": True})
        calls = completion(None, "tool_calls")
        calls["choices"][0]["message"]["tool_calls"] = [CALL]
        url = self.serve(answer(json.dumps(calls))).url
        self.assertIn("--json shows", self.run_main("--no-stream", "x", url=url)[2])

    def test_statuses(self):
        part = sse(delta("part"), done=False)
        for what, status, shown, message in (
            (reply("cut", "length"), 3, "cut\n", "length"),
            (reply("cut", "abort"), 3, "cut\n", "abort"),
            (reply("cut", "error"), 3, "cut\n", "error"),
            (part, 3, "part\n", "stopped before its end"),
            (answer("no", status=404), 1, "", "/v1/chat/completions"),
            (answer("nope", status=401), 4, "", "DEEPINFRA_TOKEN"),
            (answer("busy", status=429), 5, "", "try later"),
            (answer("context length", status=400), 1, "", "4,096"),
            (sse({"error": "Boom"}), 1, "", "Boom"),
        ):
            url = self.serve(what).url
            with self.subTest(message):
                seen = self.run_main("x", "--retries", "0", url=url)
                self.assertEqual(seen[:2], (status, shown))
                self.assertRegex(seen[2], r"\Anemotron: [^\n]{1,289}\n\Z")
                self.assertIn(message, seen[2])
        with mock.patch.dict(os.environ, DEEPINFRA_BASE_URL=""):
            status, _, err = program("-n", "x")
        self.assertEqual(status, 4)
        self.assertRegex(err, "DEEPINFRA_TOKEN.*--offline")

    def test_help(self):
        status, out, _ = program("-h")
        self.assertEqual(status, 0)
        for text in ("usage: nemotron.py ", "examples:\n  nemotron.py ", "\n  141  "):
            self.assertIn(text, out)
        self.assertEqual(program("--version")[:2], (0, nemotron.__version__ + "\n"))
        for args in (["-h"], ["-n", "--offline", "x"]):
            command = [sys.executable, HERE / "nemotron.py", *args]
            done = subprocess.run(
                ["sh", "-c", 'exec "$@" >&-', "sh", *command],
                stderr=-1,
                env=environment(),
            )
            self.assertNotIn(b"Traceback", done.stderr)

    def test_alone_in_a_folder(self):
        shutil.copy(HERE / "nemotron.py", self.folder / "other.py")
        (self.folder / "package").mkdir()
        shutil.copy(HERE / "nemotron.py", self.folder / "package")
        code = (
            "from package import nemotron; print(nemotron.build_request('x')['model'])"
        )
        source = (HERE / "nemotron.py").read_bytes()
        for args, stdin, shown in (
            (["-I", "-S", "other.py", "--offline", "-n", "Hello!"], b"", "Hello!"),
            (["-", "--offline", "Hello!"], source, "Hello!"),
            (["-c", code], b"", nemotron.MODEL),
        ):
            done = subprocess.run(
                [sys.executable, *args],
                input=stdin,
                stdout=-1,
                cwd=self.folder,
                env=environment(),
            )
            self.assertEqual((done.returncode, done.stdout.decode()), (0, shown + "\n"))

    def test_import_is_small_and_quiet(self):
        def modules(code):
            code += "; import sys; print(*sorted(sys.modules))"
            done = subprocess.run(
                [sys.executable, "-I", "-c", code], capture_output=True, cwd=HERE
            )
            self.assertEqual(done.stderr, b"")
            return set(done.stdout.decode().split())

        known = "collections, contextlib, email.utils, errno, http.client, json"
        known += ", math, operator, random, re, reprlib, threading, urllib.request"
        path = f"import sys; sys.path.insert(0, {str(HERE)!r}); import nemotron"
        more = (
            modules(path)
            - modules(f"import {known}")
            - {"nemotron", "select", "__future__"}
        )
        self.assertEqual(more, set())

    @unittest.skipUnless(POSIX, "pipes")
    def test_pipes(self):
        endless = sse(*[delta("x\n")] * 100000, END)
        command = [sys.executable, HERE / "nemotron.py", "-n", "x"]
        env = environment(DEEPINFRA_BASE_URL=self.serve(endless).url)
        process = subprocess.Popen(command, env=env, stdout=-1, stderr=-1)
        process.stdout.read(2)
        process.stdout.close()
        self.assertEqual((process.stderr.read(), process.wait(60)), (b"", 141))
        process.stderr.close()
        if os.path.exists("/dev/full"):
            with open("/dev/full", "w") as full:
                status, _, err = program("--offline", "-n", "x", stdout=full)
            self.assertEqual(status, 1)
            self.assertIn("standard output: No space left on device", err)
            with open("/dev/full", "w") as full:
                self.assertEqual(program("-h", stdout=full)[0], 1)
        env["DEEPINFRA_BASE_URL"] = self.serve(
            sse(delta("part"), done=False, end="stall")
        ).url
        process = subprocess.Popen(command, env=env, stdout=-1, stderr=-1)
        self.assertEqual(process.stdout.read(4), b"part")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out, err), (130, b"\n", b""))
        command = [sys.executable, HERE / "nemotron.py", "--offline"]
        process = subprocess.Popen(
            command, stdin=-1, stdout=-1, stderr=-1, env=environment()
        )
        note = process.stderr.readline()  # after two seconds
        self.assertIn(b"waiting for standard input", note)
        self.assertEqual(process.communicate(b"late")[0], b"late\n")


class ConversationTests(MainCase):
    def setUp(self):
        super().setUp()
        self.file = self.folder / "chat.json"

    def messages(self):
        return json.loads(self.file.read_text())

    def test_a_conversation(self):
        self.assertEqual(
            self.run_main("-c", self.file, "-s", "S", "one")[:2], (0, "one\n")
        )
        if POSIX:
            self.assertEqual(self.file.stat().st_mode & 0o777, 0o600)
            self.file.chmod(0o640)
        link = self.folder / "link"
        link.symlink_to(self.file)
        self.assertEqual(self.run_main("-c", link, "-s", "T", "two")[0], 0)
        roles = [message["role"] for message in self.messages()]
        self.assertEqual(roles, ["system", "user", "assistant", "user", "assistant"])
        self.assertEqual(self.messages()[0]["content"], "T")
        self.assertEqual(len(self.server.requests[-1].json["messages"]), 4)
        self.assertTrue(link.is_symlink())
        if POSIX:
            self.assertEqual(self.file.stat().st_mode & 0o777, 0o640)
        self.assertEqual(sorted(os.listdir(self.folder)), ["chat.json", "link"])

    def test_without_a_prompt_after_a_tool(self):
        self.file.write_text(json.dumps([USER, CALLS, TOOL]))
        self.assertEqual(self.run_main("-c", self.file)[:2], (0, "42\n"))
        self.assertEqual(self.server.requests[-1].json["messages"], [USER, CALLS, TOOL])
        self.assertEqual(self.run_main("-c", self.file)[0], 2)  # an assistant's is last

    def test_untouched_unless_the_reply_has_ended(self):
        before = json.dumps([USER, ASSISTANT])
        self.file.write_text(before)
        for what in (answer("no", status=400), sse(delta("part"), done=False)):
            self.assertNotEqual(
                self.run_main("-c", self.file, "x", url=self.serve(what).url)[0], 0
            )
            self.assertEqual(self.file.read_text(), before)
        url = self.serve(reply("cut", "length")).url
        self.assertEqual(self.run_main("-c", self.file, "x", url=url)[0], 3)
        self.assertEqual(self.messages()[-1]["content"], "cut")

    def test_never_over_the_change_of_another_run(self):
        def change(request):
            self.file.write_text(json.dumps([USER]))
            return echo(request)

        status, out, err = self.run_main(
            "-c", self.file, "x", url=self.serve(change).url
        )
        self.assertEqual((status, out, self.messages()), (1, "x\n", [USER]))
        self.assertIn("was changed meanwhile", err)

    def test_bad_files(self):
        for text, expected in (
            ("", "chat.json"),
            ("{}", "a list"),
            ("[1]", "messages[0]"),
            (json.dumps([USER, {"role": "x"}]), "messages[1]"),
            ("[" * 100000, "chat.json"),
            ("[\xff", "chat.json"),
        ):
            self.file.write_text(text, encoding="latin-1")
            with self.subTest(text[:20]):
                status, _, err = self.run_main("-c", self.file, "x")
                self.assertEqual((status, expected in err), (2, True), err)
                self.assertEqual(self.file.read_text(encoding="latin-1"), text)
        if POSIX:
            os.unlink(self.file)
            os.mkfifo(self.file)
            self.assertEqual(self.run_main("-c", self.file, "x")[0], 2)
        self.assertEqual(self.server.requests, [])

    def test_a_chat_from_a_pipe(self):
        stdin = "two\n\n \nthree \u20ac\nexit\nfour\n".encode()
        args = ["-i", "-c", self.file, "first", "turn", "-u"]
        status, out, err = program(*args, stdin=stdin, env=self.env)
        self.assertEqual((status, out), (0, "first turn\ntwo\nthree \u20ac\n"))
        self.assertEqual((err.count("tokens"), len(self.messages())), (3, 6))

    def test_an_error_drops_the_turn(self):
        url = self.serve(answer("context length", status=400), echo).url
        status, out, err = program("-i", "one", "--base-url", url, stdin=b"two\n")
        self.assertEqual((status, out), (0, "two\n"))
        self.assertIn("new conversation", err)
        self.assertEqual(program("-i", "one")[0], 4)


class Terminal:
    """The program on a pseudo-terminal of its own, with Ctrl-C and all."""

    START = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )

    def __init__(self, *args, stdout=None, **env):
        self.file, terminal = os.openpty()
        env = environment(**{"TERM": "xterm", "COLUMNS": "80", **env})
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.START, HERE / "nemotron.py", *map(str, args)],
            stdin=terminal,
            stdout=stdout or terminal,
            stderr=terminal,
            start_new_session=True,
            env=env,
        )
        os.close(terminal)
        self.seen = ""

    def expect(self, text, resend=None):
        """Wait until the text is on the screen; send `resend` each second until it is."""
        for _ in range(10000):
            if text in self.seen:
                break
            if not select.select([self.file], [], [], 1 if resend else 60)[0]:
                if not resend:
                    break
                self.send(resend)
                continue
            with contextlib.suppress(OSError):  # the end, on Linux
                self.seen += os.read(self.file, 4096).decode()
                continue
            break
        if text not in self.seen:
            raise AssertionError(f"{text!r} did not come: {self.seen!r}")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def send(self, text):
        os.write(self.file, text.encode())

    def end(self):
        """Return the status, and the rest of what was on the screen."""
        with contextlib.suppress(OSError):
            while new := os.read(self.file, 4096).decode():
                self.seen += new
        os.close(self.file)
        return self.process.wait(60), self.seen


@unittest.skipUnless(POSIX, "pseudo-terminals")
class TerminalTests(Case):
    def setUp(self):
        super().setUp()
        self.guard = threading.Timer(100, os._exit, (9,))  # rather than hang for ever
        self.guard.start()
        self.addCleanup(self.guard.cancel)

    def terminal(self, *args, server=None, **kwargs):
        server = server or self.serve(echo)
        return Terminal(*args, DEEPINFRA_BASE_URL=server.url, **kwargs)

    def test_a_chat(self):
        file = self.folder / "chat.json"
        screen = self.terminal("-i", "-u", "-c", file, "hello")
        screen.expect("hello\r\nnemotron: 3 + 2 tokens")
        screen.expect("exit or Ctrl-D ends the chat")
        screen.expect("> ")
        screen.send("one\r")
        screen.expect("one\r\nnemotron: 3 + 2 tokens")
        screen.expect("> ")
        with contextlib.suppress(ImportError):
            import readline

            if "libedit" not in (readline.__doc__ or ""):
                screen.send("\x1b[200~two\nlines\x1b[201~\r")  # a paste is one turn
                screen.expect("two\r\nlines\r\nnemotron: 3 + 2 tokens")
                screen.expect("> ")
                self.assertEqual(
                    json.loads(file.read_text())[-1]["content"], "two\nlines"
                )
        screen.send("half a li")
        screen.expect("half a li")
        screen.send("\x03")
        screen.expect("> ", resend="\x03")
        screen.send("exit\r")
        self.assertEqual(screen.end()[0], 0)

    def test_ctrl_c_in_a_reply_keeps_the_chat(self):
        server = self.serve(sse(delta("endless"), done=False, end="stall"), echo)
        screen = self.terminal("-i", server=server)
        screen.expect("> ")
        screen.send("one\r")
        screen.expect("endless")
        screen.send("\x03")
        screen.expect("this turn is dropped\r\n")
        screen.expect("> ")
        screen.send("two\r")
        screen.expect("\rtwo\r\n")
        screen.expect("> ")
        screen.send("\x04")
        self.assertEqual(screen.end()[0], 0)
        self.assertEqual(len(server.requests[1].json["messages"]), 1)

    def test_one_prompt(self):
        text = "\x1b[31mred\x07\x9b\u202e\r\n\ttab\x7f"
        shown = "\\x1b[31mred\\x07\\x9b\\u202e\\r\r\n\ttab\\x7f\r\n"
        for args in ([], ["--no-stream"]):
            screen = self.terminal("x", *args, server=self.serve(reply(text)))
            self.assertEqual(screen.end(), (0, shown))
        broken = self.serve(sse(delta("part"), done=False, end="stall"))
        screen = self.terminal("x", server=broken)
        screen.expect("part")
        screen.send("\x03")
        self.assertEqual(screen.end(), (130, "^C\r\n"))
        status, seen = self.terminal().end()
        self.assertEqual(status, 2)
        self.assertRegex(
            seen, r"\Anemotron: no prompt: nemotron.py \[options\][^\n]*\n\Z"
        )
        screen = self.terminal("a", "-")
        screen.send("typed\r\x04")
        screen.expect("a\r\n\r\ntyped\r\n")
        self.assertEqual(screen.end()[0], 0)

    def test_the_prompt_is_not_in_a_redirected_output(self):
        with open(self.folder / "out", "wb") as out:
            screen = self.terminal("-i", stdout=out)
            screen.expect("> ")
            screen.send("one\r")
            screen.expect("> ")
            screen.send("\x04")
            self.assertEqual(screen.end()[0], 0)
        self.assertEqual((self.folder / "out").read_bytes(), b"one\n")

    def test_progress_of_a_batch(self):
        requests = self.folder / "requests"
        requests.write_text("a\n" * 3)
        steps = threading.Semaphore(0)
        server = self.serve(lambda request: (steps.acquire(timeout=60), reply())[1])
        with open(self.folder / "out", "wb") as out:
            screen = self.terminal(
                "--batch", requests, "-j", "1", server=server, stdout=out
            )
            steps.release()
            screen.expect("\r1 of 3 done, 0 failed, ")
            screen.expect("s left")
            steps.release(2)
            status, rest = screen.end()
        self.assertEqual(status, 0)
        self.assertRegex(rest, r"\r {79}\rnemotron: 3 of 3 done, 0 failed, .*s\r\n\Z")


# --------------------------------------------------------------------- Documentation


class ReadmeTests(Case):
    README = (HERE / "README.md").read_text(encoding="utf-8")

    def setUp(self):
        super().setUp()
        shutil.copy(HERE / "nemotron.py", self.folder)
        url = self.serve(echo).url
        self.env = environment(DEEPINFRA_BASE_URL=url, DEEPINFRA_TOKEN="x")

    def blocks(self, language):
        return re.findall(rf"^```{language}\n(.*?)^```", self.README, re.M | re.S)

    def run_in_folder(self, *command):
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done.stdout.decode()

    def test_the_tables(self):
        cells = r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \| (.*) \|$"
        rows = [
            (name, kind, limits and f"`{limits}`", default, text)
            for name, kind, limits, default, text in nemotron.PARAMETERS
        ]
        self.assertEqual(re.findall(cells, self.README, re.M), rows)
        known = ", ".join(re.findall(r"^\| ([\d, ]+) \| ", self.README, re.M))
        statuses = re.findall(r"^  (\d+) ", nemotron.HELP_END, re.M)
        self.assertEqual(known.split(", "), statuses)
        names = [name for name in nemotron.__all__ if name.endswith("Error")]
        codes = {getattr(nemotron, name).code for name in names}
        codes |= {"duplicate_custom_id"}
        (text,) = re.findall(r"Codes:(.*?)\. A", self.README, re.S)
        expected = codes - {"error", "incomplete_reply"}
        self.assertEqual(set(re.findall(r"`(\w+)`", text)), expected)

    def test_the_python_examples(self):
        blocks = [code for code in self.blocks("python") if "pyspark" not in code]
        self.assertGreater(len(blocks), 3)
        for code in blocks:
            with self.subTest(code):
                self.run_in_folder(sys.executable, "-W", "error", "-c", code)

    @unittest.skipUnless(shutil.which("bash"), "bash")
    def test_the_shell_examples(self):
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "python3").symlink_to(sys.executable)
        curl = self.folder / "bin" / "curl"  # which would ask the real server
        curl.write_text("#!/bin/sh\ncat\n")
        curl.chmod(0o755)
        self.env["PATH"] = f"{self.folder / 'bin'}:{self.env['PATH']}"
        outputs = {}
        for code in self.blocks("sh"):
            if "unittest" not in code:
                with self.subTest(code):
                    code = code.replace("DEEPINFRA_TOKEN=...", "DEEPINFRA_TOKEN=x")
                    out = self.run_in_folder("bash", "-euo", "pipefail", "-c", code)
                    outputs[code] = out
        everything = "\n".join(outputs.values())
        for expected in (
            "Hello!\n",
            "Explain this code.\n\ndef f(x)",
            "trout: How long do I roast trout?\n",
            '"seed": 7}',
        ):
            self.assertIn(expected, everything)
        pairs = (self.folder / "pairs.jsonl").read_text().splitlines()
        question = "Write one question about cooking trout."
        self.assertEqual(len(pairs), 6)
        pair = {"prompt": question, "answer": question}
        self.assertEqual([json.loads(line) for line in pairs].count(pair), 2)
        self.assertEqual(len(json.loads((self.folder / "chat.json").read_text())), 5)


if __name__ == "__main__":
    unittest.main()
