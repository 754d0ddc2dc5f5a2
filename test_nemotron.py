"""Tests of nemotron.py: standard library, no network but loopback, nothing patched.

One server, `Server`, answers with what a case says, byte for byte.  Time is never
slept away: a `Client` has `_clock` and `_sleep`, and what must wait waits for an event.
"""

from __future__ import annotations

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
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import nemotron

HERE = pathlib.Path(__file__).resolve().parent
TOKEN = "s3cret-token/of+tests=="
POSIX = os.name == "posix"

# ---------------------------------------------------------------- The loopback server

Answer = collections.namedtuple("Answer", "pieces status headers framing end")


def answer(*pieces, status=200, headers=(), framing="length", end="clean"):
    """What the server sends: framing is length, chunked (each piece one chunk) or close;
    end is clean, short (framing says more), reset, or stall."""
    raw = [p.encode() if isinstance(p, str) else p for p in pieces]
    return Answer(raw, status, dict(headers), framing, end)


def sse(*datas, done=True, **kwargs):
    """A stream with these objects (or texts) as its data."""
    texts = [d if isinstance(d, str) else json.dumps(d) for d in datas]
    texts += ["[DONE]"] * done
    kwargs = {"framing": "chunked", "headers": {"Content-Type": "text/event-stream"},
              **kwargs}
    return answer(*[f"data: {text}\n\n" for text in texts], **kwargs)


def delta(content=None, finish=None, index=0, **fields):
    part = {} if content is None else {"role": "assistant", "content": content}
    choice = {"index": index, "delta": part, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m",
            "choices": [choice], **fields}


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
         "estimated_cost": 0.25}


def completion(content="ok", finish="stop", **fields):
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion", "created": 7, "model": "m",
            "choices": [choice], "usage": USAGE, **fields}


def reply(*args, **kwargs):
    return answer(json.dumps(completion(*args, **kwargs)))


class Request:
    def __init__(self, line, headers, body):
        self.method, self.path, _ = line.split(" ")
        self.headers = {k.lower(): v for k, v in headers}
        self.raw = body
        self.json = json.loads(body) if body else None


class Server:
    """Answers on 127.0.0.1 with `answers`: one for each request, the last for all that
    follow; or with what a function of the Request returns."""

    def __init__(self, *answers):
        self._answers, self._lock = answers, threading.Lock()
        self.requests, self.flying, self.most = [], 0, 0
        self.over = threading.Event()  # lets a stall end
        self.tls = None  # or an SSLContext
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def client(self, **settings):
        client = nemotron.Client(
            **{"token": TOKEN, "base_url": self.url, "timeout": 10, **settings})
        client.slept = []
        client._sleep = client.slept.append
        return client

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

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
                if not line:
                    return
                headers = []
                while header := file.readline().decode().strip():
                    headers.append(header.split(": ", 1))
                length = int(dict(headers).get("Content-Length", 0))
                body = file.read(length)
                if len(body) < length:  # the client is gone
                    return
                request = Request(line, headers, body)
            with self._lock:
                number = len(self.requests)
                self.requests.append(request)
                self.flying += 1
                self.most = max(self.most, self.flying)
            try:
                source = self._answers[min(number, len(self._answers) - 1)]
                self._send(connection, source(request) if callable(source) else source)
            finally:
                with self._lock:
                    self.flying -= 1

    def _send(self, connection, what):
        if what is None:  # gone before a word
            return
        headers = dict(what.headers)
        if what.framing == "length":
            extra = 10 if what.end != "clean" else 0
            headers["Content-Length"] = sum(map(len, what.pieces)) + extra
        elif what.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        head = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        connection.sendall(f"HTTP/1.1 {what.status} Words\r\n{head}\r\n".encode("latin-1"))
        for piece in what.pieces:
            if what.framing == "chunked":
                piece = b"%x\r\n%s\r\n" % (len(piece), piece)
            connection.sendall(piece)
        if what.framing == "chunked" and what.end == "clean":
            connection.sendall(b"0\r\n\r\n")
        if what.end == "stall":
            self.over.wait(30)
        if what.end == "reset":
            # What was sent must have been read, or the reset would throw it away.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                  struct.pack("ii", 1, 0))


def quiet(function):
    """Run a test with the logger's warnings kept out of the output."""
    def run(self):
        with self.assertLogs("nemotron", "WARNING") as self.logged:
            logging.getLogger("nemotron").warning("none so far")
            function(self)
    run.__name__ = function.__name__
    return run


def program(*args, stdin=b"", env=(), **kwargs):
    """Run nemotron.py as a program; (status, stdout, stderr), as text."""
    done = subprocess.run(
        [sys.executable, str(HERE / "nemotron.py"), *map(str, args)],
        input=stdin, capture_output=True, env=environment(**dict(env)), timeout=60, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def environment(**extra):
    keep = ("PATH", "HOME", "SYSTEMROOT", "TMPDIR", "LANG")
    base = {name: os.environ[name] for name in keep if name in os.environ}
    return {**base, **{k: v for k, v in extra.items() if v is not None}}


def main(*args, stdin=""):
    """Call main(); (status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = nemotron.main([str(arg) for arg in args])
    finally:
        sys.stdin = before
    return status, out.getvalue(), err.getvalue()


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        kept = {name: os.environ.pop(name) for name in list(os.environ)
                if name.startswith(("DEEPINFRA_", "NEMOTRON_"))
                or name.lower().endswith("_proxy")}
        self.addCleanup(os.environ.update, kept)

    def serve(self, *answers):
        server = Server(*answers)
        self.addCleanup(server.__exit__)
        return server

    def setenv(self, **variables):
        os.environ.update(variables)
        for name in variables:
            self.addCleanup(os.environ.pop, name, None)

    def refused(self, call, *args, **kwargs):
        """The words of the InvalidRequestError that the call raises."""
        with self.assertRaises(nemotron.InvalidRequestError) as caught:
            call(*args, **kwargs)
        return str(caught.exception)


# -------------------------------------------------------------- Parameters and requests

# (name, accepted, refused), written out from the provider's page and OpenAPI file.
BOUNDS = (
    ("temperature", (0, 2, 0.7, 1), (-0.001, 2.001, True, "1", float("nan"))),
    ("top_p", (0.001, 1), (0, 1.001, -1)),
    ("min_p", (0, 1), (-0.001, 1.001)),
    ("top_k", (0, 999), (-1, 1000, 1.0, True)),
    ("max_tokens", (0, 1000000), (-1, 1000001, 10.0)),
    ("presence_penalty", (-2, 2), (-2.001, 2.001, float("inf"))),
    ("frequency_penalty", (-2, 2), (-2.001, 2.001)),
    ("repetition_penalty", (0.01, 5), (0.0099, 5.001)),
    ("seed", (0, 2**63 - 1), (-1, 2**63, 9223372036854776000, 1.0)),
    ("tool_choice", ("none", "auto"), ("required", "", {}, [])),
    ("user", ("", "me"), (1, ["me"])),
    ("stop", ("x", ["x"], ["x"] * 16), ([], ["x"] * 17, [1], 1)),
    ("n", (1, 4), (0, 5, 1.0)),
    ("tools", ([], [{"type": "function"}]), ({}, ["f"])),
    ("response_format", ({"type": "json_object"},), ("json", [])),
)


class ParameterTests(Case):
    def test_bounds_written_out(self):
        self.assertEqual({row[0] for row in BOUNDS}, set(nemotron.DOCUMENTED))
        for name, accepted, refused in BOUNDS:
            for value in accepted:
                with self.subTest(name, accepted=value):
                    body = nemotron.build_request("x", **{name: value})
                    self.assertEqual(body[name], value)
            for value in refused:
                with self.subTest(name, refused=value):
                    words = self.refused(nemotron.build_request, "x", **{name: value})
                    self.assertIn(name, words)

    def test_bounds_of_the_table(self):
        ranges = [row for row in nemotron.PARAMETERS if row.range]
        self.assertGreater(len(ranges), 9)
        for row in ranges:
            low, above, name, below, high = row.range.split()
            self.assertEqual(name, row.name)
            kind = int if row.kind == "an integer" else float
            step = 1 if kind is int else 1e-6
            for bound, strict, out in ((kind(low), above == "<", -step),
                                       (kind(high), below == "<", step)):
                inside = bound - out if strict else bound
                with self.subTest(row.name, bound=bound):
                    nemotron.build_request("x", **{row.name: inside})
                    self.refused(nemotron.build_request, "x", **{row.name: inside + out})

    def test_none_is_not_given(self):
        params = dict.fromkeys(nemotron.DOCUMENTED)
        body = nemotron.build_request("x", system=None, extra=None, model=None, **params)
        self.assertEqual(body, {"model": nemotron.MODEL,
                                "messages": [{"role": "user", "content": "x"}]})

    def test_unknown_names_the_nearest(self):
        for name, nearest in (("temprature", "temperature"), ("max_token", "max_tokens"),
                              ("top-k", "top_k"), ("system_prompt", "system")):
            with self.subTest(name):
                words = self.refused(nemotron.build_request, "x", **{name: 1})
                self.assertIn(f"did you mean {nearest}?", words)

    def test_extra(self):
        extra = {"logprobs": True, "temperature": 9}
        body = nemotron.build_request("x", temperature=1, extra=extra)
        self.assertEqual((body["logprobs"], body["temperature"]), (True, 9))
        self.assertEqual(extra, {"logprobs": True, "temperature": 9})
        for name in ("messages", "model", "stream"):
            self.assertIn(name, self.refused(
                nemotron.build_request, "x", extra={name: 1}))
        self.refused(nemotron.build_request, "x", extra=[1])

    def test_what_is_not_json_is_refused_before_it_is_sent(self):
        with Server(reply()) as server:
            for value in (float("nan"), {1, 2}, object()):
                with self.subTest(value):
                    self.refused(server.client().chat, "x", extra={"y": value})
            loop = []
            loop.append(loop)
            self.refused(server.client().chat, "x", extra={"y": loop})
            self.assertEqual(server.requests, [])


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
    "a tool's answer": [USER, CALLS, TOOL],
    "no content but calls": [USER, {"role": "assistant", "tool_calls": [CALL]}, TOOL],
    "other keys": [{**USER, "name": "me"}],
    "a tuple": (USER,),
    "half a pair": [{"role": "user", "content": "\ud83d"}],
}
BAD_MESSAGES = {
    "empty": ([], "no user message"),
    "system alone": ([SYSTEM], "no user message"),
    "assistant last": ([USER, ASSISTANT], "messages[1]"),
    "assistant last but system": ([USER, ASSISTANT, SYSTEM], "messages[1]"),
    "two systems": ([SYSTEM, USER, SYSTEM], "messages[2]: a second system"),
    "not an object": ([USER, "x"], "messages[1]"),
    "unknown role": ([{"role": "robot", "content": "x"}], "messages[0]: role"),
    "unhashable role": ([{"role": [], "content": "x"}], "messages[0]: role"),
    "no content": ([{"role": "user"}], "messages[0]: content"),
    "content in parts": ([{"role": "user", "content": [{}]}], "messages[0]: content"),
    "null without calls": ([{"role": "assistant", "content": None}, USER], "messages[0]"),
    "null with no calls": ([{**CALLS, "tool_calls": []}, USER], "messages[0]"),
    "a tool without id": ([USER, CALLS, {"role": "tool", "content": ""}], "messages[2]"),
    "a number": (5, "messages must be"),
    "an object": (USER, "messages must be"),
    "none": (None, "messages must be"),
}


class RequestTests(Case):
    def test_good_messages(self):
        for name, messages in GOOD_MESSAGES.items():
            with self.subTest(name):
                body = nemotron.build_request(messages)
                self.assertEqual(body["messages"], list(messages))

    def test_bad_messages(self):
        for name, (messages, words) in BAD_MESSAGES.items():
            with self.subTest(name):
                self.assertIn(words, self.refused(nemotron.build_request, messages))

    def test_system(self):
        body = nemotron.build_request("u", system="s")
        self.assertEqual(body["messages"], [SYSTEM, USER])
        self.refused(nemotron.build_request, [SYSTEM, USER], system="s")
        self.refused(nemotron.build_request, "u", system=5)

    def test_objects_of_the_caller_stay(self):
        messages, before = [SYSTEM, USER], json.dumps([SYSTEM, USER])
        body = nemotron.build_request(messages, stop=["x"])
        body["messages"][1]["content"] = "changed"
        body["messages"].append("more")
        self.assertEqual(json.dumps(messages), before)

    def test_stream_belongs_to_the_call(self):
        self.assertEqual(nemotron.build_request("x", stream=True)["stream"], True)
        self.assertNotIn("stream", nemotron.build_request("x"))
        self.refused(nemotron.Client(token="t").chat, "x", stream=True)


# Each form of a batch's request, and its body.
FORMS = {
    "text": ("u", {}),
    "a prompt": ({"prompt": "u", "custom_id": "x", "seed": 1}, {"seed": 1}),
    "a prompt and system": ({"prompt": "u", "system": "s"}, {"messages": [SYSTEM, USER]}),
    "a body": ({"messages": [USER], "top_k": 5, "logprobs": True},
               {"top_k": 5, "logprobs": True}),
    "a body with stream": ({"messages": [USER], "stream": True, "model": "z"},
                           {"model": "z"}),
    "a batch line": ({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
                      "body": {"model": "z", "messages": [USER], "max_tokens": 9}},
                     {"model": "z", "max_tokens": 9}),
    "a DeepInfra line": ({"custom_id": "a", "url": "/v1/openai/chat/completions",
                          "body": {"messages": [USER], "seed": None}}, {}),
    "its own system": ({"messages": [SYSTEM, USER]}, {"messages": [SYSTEM, USER]}),
}
BAD_FORMS = {
    "a number": 5, "none": None, "a list": [USER], "nothing in it": {},
    "both": {"prompt": "u", "messages": [USER]}, "prompt a number": {"prompt": 5},
    "a bad parameter": {"prompt": "u", "top_p": 0}, "body a list": {"body": []},
    "another url": {"url": "/v1/embeddings", "body": {"messages": [USER]}},
    "another method": {"method": "GET", "body": {"messages": [USER]}},
    "a numeric id": {"custom_id": 5, "prompt": "u"}, "bad messages": {"messages": 5},
}


class BatchRequestTests(Case):
    def test_forms(self):
        for name, (form, expected) in FORMS.items():
            with self.subTest(name):
                before = json.dumps(form)
                body = nemotron.read_request(form, {"model": "m"})
                self.assertEqual(body, {"model": "m", "messages": [USER], **expected})
                self.assertEqual(json.dumps(form), before)

    def test_bad_forms(self):
        for name, form in BAD_FORMS.items():
            with self.subTest(name):
                self.refused(nemotron.read_request, form, {})

    def test_defaults(self):
        defaults = {"model": "m", "system": "s", "seed": 1, "extra": {"a": 1, "b": 1}}
        body = nemotron.read_request({"prompt": "u", "seed": 2, "b": 2}, defaults)
        self.assertEqual(body, {"model": "m", "messages": [SYSTEM, USER], "seed": 2,
                                "a": 1, "b": 2})
        own = {"role": "system", "content": "own"}
        body = nemotron.read_request({"messages": [own, USER]}, defaults)
        self.assertEqual(body["messages"], [own, USER])


# ---------------------------------------------------------------------------- Replies

ODD = (None, 5, "x", [], {}, [None], [5], ["x"], [[]], [{}], {"0": {}}, True,
       [{"index": None}], [{"index": 0, "message": None, "delta": None}],
       [{"message": {"content": 5, "tool_calls": 5}, "finish_reason": 5}],
       [{"message": {"content": ["x"], "tool_calls": [5]}}], [{"message": [], "delta": "x"}],
       [{"index": [], "delta": {"content": {}, "tool_calls": [{"function": 5}]}}])


class ReplyTests(Case):
    def test_the_properties_never_raise(self):
        for value in ODD:
            for kind in (nemotron.Completion, nemotron.Chunk):
                with self.subTest(kind.__name__, value=value):
                    one = kind(choices=value, usage=value)
                    self.assertEqual(one.text, "")
                    self.assertIsNone(one.finish_reason)
                    self.assertIsInstance(one.usage, dict)
                    if kind is nemotron.Completion:
                        self.assertEqual(one.tool_calls, [])
                        self.assertIsNone(one.cost)
                        self.assertEqual(one.message, {"role": "assistant", "content": ""})
                    joiner = nemotron.Joiner(False)
                    joiner.add(nemotron.Chunk(one))
                    self.assertEqual(joiner.completion().text, "")

    def test_choice_0_is_the_one_with_its_index(self):
        choices = [{"index": 1, "message": {"content": "b"}},
                   {"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]
        one = nemotron.Completion(choices=choices)
        self.assertEqual((one.text, one.finish_reason), ("a", "stop"))
        self.assertEqual(nemotron.Chunk(delta("b", index=1)).text, "")

    def test_a_cost_is_a_sensible_number(self):
        for cost, expected in ((0, 0), (0.5, 0.5), (10**400, None), (1e308, None),
                               (True, None), ("1", None), (float("nan"), None)):
            with self.subTest(cost):
                one = nemotron.Completion(usage={"estimated_cost": cost})
                self.assertEqual(one.cost, expected)

    def test_message_goes_into_the_next_request(self):
        whole = nemotron.Completion(choices=[{"message": {
            "role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}}])
        self.assertEqual(whole.message["tool_calls"], [CALL])
        nemotron.build_request([USER, whole.message, TOOL])

    def test_errors_are_one_line_and_can_be_pickled(self):
        errors = [getattr(nemotron, name) for name in nemotron.__all__
                  if name.endswith("Error")]
        self.assertEqual(len(errors), 9)
        for kind in errors:
            with self.subTest(kind.__name__):
                error = kind("a\nb\x1b[31m")
                self.assertEqual(str(error), "a b\\x1b[31m")
                error.status_code = 418
                again = pickle.loads(pickle.dumps(error))
                self.assertEqual((type(again), str(again), again.status_code),
                                 (kind, str(error), 418))
        self.assertTrue(issubclass(nemotron.APITimeoutError, TimeoutError))
        self.assertTrue(issubclass(nemotron.InvalidRequestError, ValueError))


# ----------------------------------------------------------------- Server-sent events

SSE_CASES = {
    "LF": (b"data: a\n\ndata: b\n\n", ["a", "b"]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    "CR": (b"data: a\r\rdata: b\r\r", ["a", "b"]),
    "mixed": (b"data: a\r\n\ndata: b\r\r\n", ["a", "b"]),
    "BOM": (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
    "no space": (b"data:a\n\ndata:  b\n\n", ["a", " b"]),
    "comments": (b": hi\n\n:\ndata: a\n: x\n\n", ["a"]),
    "several lines": (b"data: a\ndata: b\ndata\n\n", ["a\nb\n"]),
    "other fields": (b"id: 1\nretry: 5\nwhat\ndatab: x\ndata: a\n\n", ["a"]),
    "no empty line at the end": (b"data: a\n\ndata: b\n", ["a", "b"]),
    "no line end at the end": (b"data: a\n\ndata: b", ["a", "b"]),
    "line separators of Unicode": ("data: a\u2028b\x85c\x0bd\n\n".encode(),
                                   ["a\u2028b\x85c\x0bd"]),
    "UTF-8": ("data: \u00e9\u20ac\U0001f600\n\n".encode(), ["\u00e9\u20ac\U0001f600"]),
    "bad UTF-8": (b"data: \xff\n\n", ["\ufffd"]),
    "an event without data": (b"event: x\n\ndata: a\n\n", ["a"]),
    "nothing": (b"", []),
    "empty data": (b"data:\n\ndata: a\n\n", ["", "a"]),
}


def cuts(raw):
    """The bytes whole, one by one, and cut at every place."""
    yield "whole", [raw]
    yield "bytes", [raw[i : i + 1] for i in range(len(raw))]
    for i in range(1, len(raw)):
        yield f"cut at {i}", [raw[:i], raw[i:]]


class EventTests(Case):
    def test_cases(self):
        for name, (raw, expected) in SSE_CASES.items():
            for cut, pieces in cuts(raw):
                with self.subTest(name, cut=cut):
                    got = [data for _, data, _ in nemotron.events(pieces)]
                    self.assertEqual(got, expected)

    def test_names_and_torn_ends(self):
        raw = b"event: error\ndata: a\n\ndata: b\n\ndata: c"
        self.assertEqual(list(nemotron.events([raw])), [
            ("error", "a", True), ("", "b", True), ("", "c", False)])

    def test_each_event_comes_when_its_line_has_come(self):
        came = []

        def pieces():
            for piece in (b"data: a\n\r", b"\ndata: b\r", b"\r"):
                yield piece
                came.append(len(got))

        got = []
        for event in nemotron.events(pieces()):
            got.append(event)
        self.assertEqual(came[0], 1)
        self.assertEqual([data for _, data, _ in got], ["a", "b"])

    def test_an_endless_event_is_an_error(self):
        for name, piece in (("line", b"x" * 65536), ("lines", b"data: xxxxxxx\n" * 4096)):
            with self.subTest(name), self.assertRaises(nemotron.ReplyError):
                for _ in nemotron.events(itertools.repeat(piece)):
                    pass
        pings = itertools.islice(itertools.repeat(b": ping\n" * 8192), 400)
        self.assertEqual(list(nemotron.events(pings)), [])  # 22 MiB, but no event


# --------------------------------------------------- The provider's documented examples

CHEF = {"role": "system", "content": "Respond like a michelin starred chef."}
LAMB = {"role": "user", "content": "Can you name at least two different techniques to "
        "cook lamb?"}
BONJOUR = {"role": "assistant", "content":
           "Bonjour! Let me tell you, my friend, cooking lamb is an art form, and I'm more "
           "than happy to share with you not two, but three of my favorite techniques to "
           "coax out the rich, unctuous flavors and tender textures of this majestic "
           "protein. First, we have the classic \"Sous Vide\" method. Next, we have the "
           "ancient art of \"Sous le Sable\". And finally, we have the more modern "
           "technique of \"Hot Smoking.\""}
SECOND = {"role": "user", "content": "Tell me more about the second method."}
HELLO_REPLY = """{
    "id": "chatcmpl-guMTxWgpFf", "object": "chat.completion", "created": 1694623155,
    "model": "nvidia/Nemotron-4-340B-Instruct",
    "choices": [{"index": 0, "message": {"role": "assistant",
        "content": " Hello! It's nice to meet you. Is there something I can help you with \
or would you like to chat for a bit?"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 15, "completion_tokens": 16, "total_tokens": 31,
        "estimated_cost": 0.0000268}}"""
LAMB_REPLY = """{
    "id": "chatcmpl-b23a3fb60cde42ce8f24bb980b4dee87", "object": "chat.completion",
    "created": 1715688169, "model": "nvidia/Nemotron-4-340B-Instruct",
    "choices": [{"index": 0, "message": {"role": "assistant",
        "content": "Sous le Sable, my friend! It's an ancient technique that's been used \
for centuries in the Middle East and North Africa. The name itself..."},
        "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 149, "total_tokens": 487, "completion_tokens": 338,
        "estimated_cost": 0.00035493}}"""
HI_DELTAS = [{"role": "assistant", "content": " "}, {"role": "assistant", "content": " Hi"},
             {"role": "assistant", "content": "!"}, {"role": "assistant", "content": ""},
             {"role": "assistant", "content": "</s>"}, {}]
HI = [{"id": "Rc5hsIPHOSfMP3rNSFUw9tfR", "object": "chat.completion.chunk",
       "created": 1694623354, "model": "nvidia/Nemotron-4-340B-Instruct",
       "choices": [{"index": 0, "delta": one, "finish_reason": None if one else "stop"}]}
      for one in HI_DELTAS]


class DocumentedTests(Case):
    def test_hello(self):
        server = self.serve(answer(HELLO_REPLY))
        reply = server.client().chat("Hello!")
        request, = server.requests
        self.assertEqual(request.json, {
            "model": "nvidia/Nemotron-4-340B-Instruct",
            "messages": [{"role": "user", "content": "Hello!"}]})
        self.assertEqual((request.method, request.path),
                         ("POST", "/v1/chat/completions"))
        self.assertEqual(request.headers["content-type"], "application/json")
        self.assertEqual(request.headers["authorization"], f"Bearer {TOKEN}")
        self.assertEqual(reply, json.loads(HELLO_REPLY))
        self.assertTrue(reply.text.startswith(" Hello! It's nice"))
        self.assertEqual(reply.finish_reason, "stop")
        self.assertEqual(reply.usage["total_tokens"], 31)
        self.assertEqual(reply.cost, 0.0000268)
        self.assertEqual(reply.message, json.loads(HELLO_REPLY)["choices"][0]["message"])

    def test_conversation(self):
        server = self.serve(answer(LAMB_REPLY))
        messages = [CHEF, LAMB, BONJOUR, SECOND]
        reply = server.client().chat(messages)
        self.assertEqual(server.requests[0].json, {
            "model": "nvidia/Nemotron-4-340B-Instruct", "messages": messages})
        self.assertTrue(reply.text.startswith("Sous le Sable, my friend!"))
        self.assertEqual((reply.usage["prompt_tokens"], reply.cost), (149, 0.00035493))

    def test_stream(self):
        server = self.serve(sse(*HI))
        client = server.client()
        self.assertEqual(list(client.stream("Hello!")), [" ", " Hi", "!"])
        self.assertEqual(server.requests[0].json, {
            "model": "nvidia/Nemotron-4-340B-Instruct", "stream": True,
            "messages": [{"role": "user", "content": "Hello!"}]})
        self.assertEqual(list(client.stream("Hello!").chunks()), HI)
        whole = client.stream("Hello!").completion()
        self.assertEqual(whole, {
            "id": "Rc5hsIPHOSfMP3rNSFUw9tfR", "object": "chat.completion",
            "created": 1694623354, "model": "nvidia/Nemotron-4-340B-Instruct",
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": "  Hi!"}}]})
        self.assertEqual(main("Hello!", "--base-url", server.url),
                         (0, "Hi!\n", ""))


# --------------------------------------------------------------------------- Streaming

# name: (data of the events, the pieces of text); all of them end well.
STREAMS = {
    "plain": ([delta("a"), delta("b"), delta(finish="stop")], ["a", "b"]),
    "text in the last": ([delta("a"), delta("b", "stop")], ["a", "b"]),
    "stop token with the reason": ([delta("a"), delta("</s>", "stop")], ["a"]),
    "stop token is text": ([delta("a"), delta("</s>"), delta("b", "stop")], ["a", "</s>b"]),
    "two stop tokens": ([delta("</s>"), delta("</s>", "stop")], ["</s>"]),
    "not quite a stop token": ([delta("</s> "), delta(finish="stop")], ["</s> "]),
    "keep-alives": (["", "null", ": ping", ":", delta("a"), delta(finish="stop")], ["a"]),
    "odd chunks": ([{}, {"choices": None}, delta(), delta("") | {"x": 1},
                    {"choices": [{"index": 0, "delta": None, "finish_reason": ""}]},
                    {"choices": [None, 5]}, delta("a"), delta(finish="length")], ["a"]),
    "usage apart": ([delta("a"), delta(finish="stop"),
                     {"choices": [], "usage": USAGE}], ["a"]),
    "usage within": ([delta("a"), delta(finish="stop", usage=USAGE)], ["a"]),
    "no reason but [DONE]": ([delta("a")], ["a"]),
    "halves of a pair": ([delta("\ud83d"), delta("\ude00"), delta(finish="stop")],
                         ["\ud83d", "\ude00"]),
    "text after the end": ([delta("a", "stop"), delta("b")], ["a"]),
    "error after the end": ([delta("a", "stop"), {"error": "late"}], ["a"]),
    "nonsense after the end": ([delta("a", "stop"), "{oops"], ["a"]),
    "other choices": ([delta("x", index=1), delta("a"), delta(finish="stop"),
                       delta(finish="stop", index=1)], ["a"]),
    "one plain reply": ([], None),
}
END = delta(finish="stop")

# name: (data, class, words of the error, text of .partial); none of them is whole.
BROKEN = {
    "error": ([delta("a"), {"error": {"message": "busy now"}}], "busy now"),
    "error as text": ([delta("a"), {"error": "out of memory"}], "out of memory"),
    "error_message": ([delta("a"), {"choices": None, "error_type": "x",
                                    "error_message": "engine died"}], "engine died"),
    "detail": ([delta("a"), {"detail": "no such thing"}], "no such thing"),
    "error beside choices": ([delta("a") | {"error": {"message": "both"}}], "both"),
    "not JSON": ([delta("a"), "{oops"], "{oops"),
    "JSON but text": ([delta("a"), '"hello"'], "hello"),
    "a list": ([delta("a"), "[1]"], "[1]"),
    "NUL and escapes": ([delta("a"), {"error": "\x1b[2J\x00"}], "\\x1b[2J\\x00"),
}


class StreamTests(Case):
    def client_of(self, *answers, **settings):
        return self.serve(*answers).client(**settings)

    def test_streams(self):
        for name, (datas, texts) in STREAMS.items():
            if texts is None:
                continue
            raw = b"".join(sse(*datas).pieces)
            for cut, pieces in (("whole", [raw]), ("bytes", [raw[i : i + 1] for i in range(
                    len(raw))]), ("events", sse(*datas).pieces)):
                client = self.client_of(answer(*pieces, framing="chunked"))
                with self.subTest(name, cut=cut):
                    stream = client.stream("x")
                    self.assertEqual(list(stream), texts)
                    whole = stream.completion()
                    self.assertEqual(whole.text, "".join(texts))
                    self.assertEqual(whole, client.stream("x").completion())
                    last = [one for one in client.stream("x").chunks() if one.usage]
                    self.assertEqual(whole.usage, last[-1].usage if last else {})

    def test_every_cut_of_a_stream(self):
        raw = b"".join(sse(delta("\u20ac\U0001f600"), delta("</s>"), END).pieces)
        raw = b"\xef\xbb\xbf" + raw.replace(b"\\u20ac", "\u20ac".encode()).replace(
            b"\n\n", b"\r\n\r\n")
        for cut, pieces in cuts(raw):
            with self.subTest(cut):
                joiner = nemotron.Joiner(False)
                for event, data, _ in nemotron.stream_events(iter(pieces)):
                    if data != "[DONE]":
                        joiner.add(nemotron.Chunk(nemotron.read_object(data, event)))
                self.assertEqual(joiner.completion().text, "\u20ac\U0001f600")

    def test_chat_equals_stream(self):
        for name, one in (("text", completion("a b c")), ("length", completion("a", "length")),
                          ("calls", completion(None, "tool_calls"))):
            if name == "calls":
                one["choices"][0]["message"]["tool_calls"] = [CALL, {**CALL, "id": "2"}]
            with self.subTest(name):
                chunks = [delta(word) for word in re.findall(r"\s*\w", "a b c")]
                if name == "calls":
                    calls = [{**CALL, "index": i, "id": str(i + 1), "function": {
                        "name": "f", "arguments": "{"}} for i in (0, 1)]
                    more = [{"index": i, "function": {"arguments": "}"}} for i in (0, 1)]
                    chunks = [delta() for _ in range(2)]
                    chunks[0]["choices"][0]["delta"] = {"content": None, "tool_calls": calls}
                    chunks[1]["choices"][0]["delta"] = {"tool_calls": more}
                elif name == "length":
                    chunks = [delta("a")]
                reason = one["choices"][0]["finish_reason"]
                client = self.client_of(reply_of(one), sse(
                    *chunks, delta(finish=reason, usage=USAGE)))
                self.assertEqual(client.chat("x"), client.stream("x").completion())

    def test_plain_json_for_a_stream(self):
        for name, text in (("compact", json.dumps(completion("one piece"))),
                           ("pretty", "\n\n" + json.dumps(completion("one piece"), indent=2)),
                           ("BOM", "\ufeff" + json.dumps(completion("one piece")))):
            for framing in ("length", "chunked"):
                pieces = [text] if framing == "length" else [
                    text.encode()[i : i + 1] for i in range(len(text.encode()))]
                client = self.client_of(answer(*pieces, framing=framing))
                with self.subTest(name, framing=framing):
                    self.assertEqual(list(client.stream("x")), ["one piece"])
                    self.assertEqual(client.stream("x").completion(), client.chat("x"))

    def test_several_choices(self):
        raw = [delta("a", index=0), delta("b", index=1), delta(finish="stop"),
               delta("c", index=1)]
        client = self.client_of(sse(*raw, delta(finish="length", index=1)),
                                sse(*raw, done=False), sse(delta("a", "stop"), done=False))
        with client.stream("x", n=2) as stream:
            self.assertEqual(list(stream), ["a"])
            texts = [c["message"]["content"] for c in stream.completion()["choices"]]
            self.assertEqual((texts, stream.completion().cut), (["a", "bc"], "length"))
        with self.assertRaises(nemotron.IncompleteReplyError) as caught:
            client.stream("x", n=2).completion()
        self.assertEqual(len(caught.exception.partial["choices"]), 2)
        self.assertEqual(client.stream("x", n=2).completion().text, "a")

    def test_the_ways_to_stop_too_early(self):
        datas = [delta("a"), delta("b")]
        for end, framing, cause in (
                ("clean", "close", type(None)), ("clean", "chunked", type(None)),
                ("short", "length", Exception), ("short", "chunked", Exception),
                ("reset", "chunked", OSError), ("stall", "chunked", OSError)):
            client = self.client_of(sse(*datas, done=False, framing=framing, end=end),
                                    timeout=0.3)
            for read in (list, nemotron.Stream.completion, lambda s: list(s.chunks())):
                with self.subTest(end, framing=framing, read=read):
                    stream = client.stream("x")
                    with self.assertRaises(nemotron.IncompleteReplyError) as caught:
                        read(stream)
                    error = caught.exception
                    self.assertEqual(error.partial.text, "ab")
                    self.assertIsInstance(error.__cause__, cause)
                    for again in (list, nemotron.Stream.completion):
                        with self.assertRaises(nemotron.IncompleteReplyError):
                            again(stream)

    def test_what_follows_the_end_cannot_spoil_it(self):
        for end in ("clean", "short", "reset", "stall"):
            for datas in ([delta("a"), END], [delta("a", "stop", usage=USAGE)]):
                client = self.client_of(
                    sse(*datas, done=False, end=end), timeout=0.3)
                with self.subTest(end, datas=datas):
                    self.assertEqual(client.stream("x").completion().text, "a")

    def test_a_whole_reply_does_not_wait_for_a_silent_server(self):
        for usage, grace in ((USAGE, 600), (None, 0.1)):
            server = self.serve(sse(delta("a", "stop", usage=usage), done=False,
                                    end="stall"))
            client = server.client(timeout=600)
            client._grace = grace
            with self.subTest(usage):
                self.assertEqual(client.stream("x").completion().text, "a")
                self.assertEqual(server.flying, 1)  # the server has not ended it

    def test_cut_at_every_place(self):
        raw = b"".join(sse(delta("a"), END).pieces)
        ended = raw.index(b"stop") + len('stop"}]}')
        server = self.serve(lambda request: answer(
            raw[: int(request.json["user"])], framing="close"))
        client = server.client()
        for place in range(0, len(raw), 3):
            with self.subTest(place):
                if place < ended:
                    with self.assertRaises(nemotron.IncompleteReplyError):
                        client.stream("x", user=str(place)).completion()
                else:
                    whole = client.stream("x", user=str(place)).completion()
                    self.assertEqual(whole.text, "a")

    def test_errors_inside(self):
        for name, (datas, words) in BROKEN.items():
            client = self.client_of(sse(*datas))
            with self.subTest(name), self.assertRaises(nemotron.ReplyError) as caught:
                list(client.stream("x"))
            self.assertNotIsInstance(caught.exception, nemotron.IncompleteReplyError)
            self.assertIn(words, str(caught.exception))
            expected = "" if "beside" in name else "a"
            self.assertEqual(caught.exception.partial.text, expected)
        for name, raw, words in (
                ("event: error", b"event: error\ndata: Boom\n\n", "Boom"),
                ("torn", b"event: error\ndata: Boom", "Boom"),
                ("with JSON", b'event: error\ndata: {"message": "Boom"}\n\n', "Boom"),
                ("[DONE] alone", b"data: [DONE]\n\n", "no reply in it"),
                ("plain error", b'{"error": {"message": "Boom"}}', "Boom"),
                ("HTML", b"<html><title>Bad &amp; gone</title></html>", "Bad & gone"),
                ("no choices", b'{"choices": []}', "no reply in it")):
            client = self.client_of(answer(raw))
            with self.subTest(name), self.assertRaises(nemotron.ReplyError) as caught:
                client.stream("x").completion()
            self.assertNotIsInstance(caught.exception, nemotron.IncompleteReplyError)
            self.assertIn(words, str(caught.exception))

    def test_an_endless_event_and_a_compressed_stream(self):
        big = self.client_of(answer(b"data: " + b"x" * (17 << 20), framing="close"))
        with self.assertRaisesRegex(nemotron.ReplyError, "over 16 MiB"):
            list(big.stream("x"))
        zipped = self.client_of(answer(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}))
        for call in (zipped.stream, zipped.chat):
            with self.assertRaisesRegex(nemotron.ReplyError, "compressed .gzip."):
                call("x")

    def test_each_piece_comes_at_once(self):
        client = self.client_of(sse(delta("a"), done=False, end="stall"))
        with client.stream("x") as stream:
            self.assertEqual(next(stream), "a")  # while the server is silent

    def test_close_and_mixed_reading(self):
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
        with self.assertRaisesRegex(nemotron.IncompleteReplyError, "closed here") as caught:
            stream.completion()
        self.assertEqual(caught.exception.partial.text, "a")

    def test_the_status_is_checked_before_the_stream_is_there(self):
        client = self.client_of(answer("no", status=400))
        with self.assertRaises(nemotron.APIStatusError):
            client.stream("x")


def reply_of(one):
    return answer(json.dumps(one))


# ------------------------------------------------------------------- Faults and retries

# (body, the server's own words in the error), as they are seen in the wild.
ERROR_BODIES = (
    ({"detail": {"error": "Not authenticated"}}, "Not authenticated"),
    ({"error": {"message": "Model busy, retry later"}}, "Model busy, retry later"),
    ({"error": {"message": "No such model", "type": "t", "param": None, "code": 404}},
     "No such model"),
    ({"error": "just text"}, "just text"),
    ({"detail": "some detail"}, "some detail"),
    ({"detail": [{"loc": ["body", "top_p"], "msg": "too high", "type": "x"},
                 {"loc": ["body"], "msg": "bad", "type": "y"}]},
     "body.top_p: too high; body: bad"),
    ({"object": "error", "message": "from vLLM"}, "from vLLM"),
    ({"detail": [{"loc": 5, "msg": "odd place"}]}, "odd place"),
    ({"error": {"message": 5}, "loc": 7}, "Words"),
    ({"title": "Gone", "status": 410, "detail": "retired in May"}, "retired in May"),
    ({"error": 429, "message": "numbers do not talk"}, "numbers do not talk"),
    ("Rate limited", "Rate limited"),
    ("<html><head><title>502 Bad\nGateway</title></head>", "502 Bad Gateway"),
    ("<html><body>no title", "Words"),
    ("", "Words"),
    ("[" * 100000, "[[["),
    (b"\xff\xfe", "\ufffd"),
    ('{"error": ' * 500 + "1" + "}" * 500, "Words"),
    ([1, {"error": None}], "Words"),
)
STATUS_CLASSES = {400: "APIStatusError", 401: "AuthenticationError",
                  402: "AuthenticationError", 403: "AuthenticationError",
                  404: "APIStatusError", 410: "APIStatusError", 422: "APIStatusError",
                  429: "RateLimitError", 500: "APIStatusError", 502: "APIStatusError",
                  503: "RateLimitError", 204: "APIStatusError", 103: "APIStatusError"}


class FaultTests(Case):
    def test_error_bodies(self):
        for body, words in ERROR_BODIES:
            raw = body if isinstance(body, (str, bytes)) else json.dumps(body)
            client = self.serve(answer(raw, status=400)).client()
            with self.subTest(words), self.assertRaises(nemotron.APIStatusError) as caught:
                client.chat("x")
            self.assertIn(words, str(caught.exception))
            self.assertIn("HTTP 400", str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))
            self.assertLessEqual(len(str(caught.exception)), 300)

    def test_status_classes(self):
        for status, name in STATUS_CLASSES.items():
            server = self.serve(answer('{"error": "x"}', status=status, headers={
                "x-request-id": "r1", "Retry-After": "7"}))
            client = server.client(retries=0)
            for call in (client.chat, client.stream):
                with self.subTest(status), self.assertRaises(nemotron.NemotronError) as caught:
                    call("x")
                error = caught.exception
                self.assertEqual(type(error).__name__, name)
                self.assertEqual((error.status_code, error.request_id, error.retry_after),
                                 (status, "r1", 7.0))
                if status not in (103, 204):  # these have no body
                    self.assertEqual(error.body, {"error": "x"})

    def test_over_the_context(self):
        for status, words in ((400, "This model's maximum context length is 4096 tokens"),
                              (500, "Requested input length 5000 exceeds 4096")):
            client = self.serve(answer(words, status=status)).client(retries=0)
            with self.subTest(status), self.assertRaisesRegex(
                    nemotron.APIStatusError, "shorten the messages.*4096"):
                client.chat("x")

    @quiet
    def test_retries_and_then_success(self):
        for status in (408, 409, 429, 500, 502, 503, 504, None):
            bad = status and answer("busy", status=status)
            server = self.serve(bad, bad, reply())
            client = server.client()
            with self.subTest(status):
                self.assertEqual(client.chat("x").text, "ok")
                self.assertEqual(len(server.requests), 3)
                first, second = client.slept
                self.assertTrue(0.375 <= first <= 0.5 and 0.75 <= second <= 1, client.slept)
        self.assertEqual(len(self.logged.output), 8 * 2 + 1)
        self.assertIn("retry 1 of 2 in", self.logged.output[1])

    @quiet
    def test_retries_come_to_an_end(self):
        server = self.serve(answer("busy", status=503))
        client = server.client(retries=7)
        with self.assertRaises(nemotron.RateLimitError):
            client.chat("x")
        self.assertEqual(len(server.requests), 8)
        for wait, most in zip(client.slept, (0.5, 1, 2, 4, 8, 8, 8)):
            self.assertTrue(0.75 * most <= wait <= most, client.slept)

    def test_no_retry_for_other_statuses(self):
        for status in (400, 401, 402, 403, 404, 410, 422, 501, 302):
            server = self.serve(answer("no", status=status), reply())
            with self.subTest(status), self.assertRaises(nemotron.APIStatusError):
                server.client().chat("x")
            self.assertEqual(len(server.requests), 1)

    @quiet
    def test_retry_after(self):
        def date(seconds):
            return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))

        for headers, low, high in (
                ({"Retry-After": "7"}, 7, 7), ({"Retry-After": "0.5"}, 0.5, 0.5),
                ({"Retry-After": date(30)}, 28, 30), ({"Retry-After": date(-30)}, 0, 0),
                ({"Retry-After": "-5"}, 0, 0), ({"Retry-After": "120"}, 120, 120),
                ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25, 0.25),
                ({"Retry-After": "soon"}, 0.375, 0.5), ({"Retry-After": "nan"}, 0.375, 0.5)):
            for status in (429, 503):
                server = self.serve(answer("busy", status=status, headers=headers), reply())
                client = server.client()
                with self.subTest(headers):
                    self.assertEqual(client.chat("x").text, "ok")
                    wait, = client.slept
                    self.assertTrue(low <= wait <= high, wait)
        for headers in ({"Retry-After": "121"}, {"Retry-After": date(500)},
                        {"Retry-After": "inf"}):
            server = self.serve(answer("busy", status=429, headers=headers), reply())
            client = server.client()
            with self.subTest(headers), self.assertRaises(nemotron.RateLimitError):
                client.chat("x")
            self.assertEqual((client.slept, len(server.requests)), ([], 1))

    @quiet
    def test_a_blocking_call_is_retried_until_its_body_is_read(self):
        whole = json.dumps(completion())
        for end in ("short", "reset", "stall"):
            server = self.serve(answer(whole[:50], end=end, framing="chunked"),
                                answer(whole[:50], end=end), reply())
            with self.subTest(end):
                self.assertEqual(server.client(timeout=0.3).chat("x").text, "ok")
        server = self.serve(answer(whole[:50], end="short"))
        with self.assertRaises(nemotron.APIConnectionError):
            server.client().chat("x")
        self.assertEqual(len(server.requests), 3)

    def test_a_stream_is_not_retried_after_its_200(self):
        server = self.serve(sse(delta("a"), done=False, end="reset"), sse(delta("b"), END))
        with self.assertRaises(nemotron.IncompleteReplyError):
            server.client().stream("x").completion()
        self.assertEqual(len(server.requests), 1)

    def test_not_an_answer(self):
        for name, text in (("HTML", "<title>Login</title>"), ("empty", ""), ("text", "ok"),
                           ("list", "[]"), ("no choices", '{"choices": []}'), ("{}", "{}"),
                           ("error", '{"error": {"message": "Boom"}}'), ("deep", "[" * 10**5),
                           ("null", '{"choices": null}'), ("number", "1" * 6000)):
            server = self.serve(answer(text))
            with self.subTest(name), self.assertRaises(nemotron.ReplyError) as caught:
                server.client().chat("x")
            self.assertEqual(len(server.requests), 1)
            self.assertEqual(caught.exception.partial, {})
            self.assertLessEqual(len(str(caught.exception)), 300)

    def test_a_reply_over_64_mib(self):
        server = self.serve(answer(*[b" " * (1 << 20)] * 65, framing="close"))
        with self.assertRaisesRegex(nemotron.ReplyError, "64 MiB"):
            server.client().chat("x")

    def test_redirects_are_errors(self):
        other = self.serve(reply())
        for status in (301, 302, 303, 307, 308):
            server = self.serve(answer("", status=status, headers={"Location": other.url}))
            for call in (server.client().chat, server.client().stream):
                with self.subTest(status), self.assertRaisesRegex(
                        nemotron.APIStatusError, "redirects are not followed"):
                    call("x")
        self.assertEqual(other.requests, [])

    @quiet
    def test_timeout(self):
        server = self.serve(answer(end="stall", framing="close"))
        for call in ("chat", "stream"):
            client = server.client(timeout=0.2, retries=1)
            if call == "stream":  # its 200 has come
                with self.assertRaises(nemotron.IncompleteReplyError):
                    client.stream("x").completion()
                continue
            with self.assertRaises(nemotron.APITimeoutError):
                client.chat("x")
            self.assertEqual(len(client.slept), 1)
        mute = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(mute.close)
        client = nemotron.Client(base_url=f"http://127.0.0.1:{mute.getsockname()[1]}",
                                 timeout=0.2, retries=0)
        for call in (client.chat, client.stream):
            with self.assertRaises(nemotron.APITimeoutError):
                call("x")

    @quiet
    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as gone:
            port = gone.getsockname()[1]
        client = nemotron.Client(base_url=f"http://127.0.0.1:{port}", retries=2)
        client._sleep = lambda seconds: None
        with self.assertRaises(nemotron.APIConnectionError) as caught:
            client.chat("x")
        self.assertIsInstance(caught.exception.__cause__, ConnectionRefusedError)
        self.assertEqual(len(self.logged.output), 3)

    def test_no_retry_for_a_host_that_does_not_exist_or_a_bad_certificate(self):
        class VerificationError(OSError):
            verify_message = "self-signed"

        for cause, again in ((socket.gaierror(socket.EAI_NONAME, "x"), False),
                             (socket.gaierror(socket.EAI_AGAIN, "x"), True),
                             (VerificationError(1, "x"), False), (OSError(1, "x"), True)):
            with self.subTest(cause):
                error = nemotron.connection_error(cause, "host")
                error.__cause__ = cause
                self.assertEqual(nemotron.may_pass(error), again)

    def deadline_client(self, server, deadline, **settings):
        """A client for which each look at the clock is one second later."""
        client = server.client(deadline=deadline, **settings)
        client._clock = itertools.count().__next__
        return client

    @quiet
    def test_deadline(self):
        drip = answer(*[b" "] * 50, framing="chunked", end="stall")
        with self.assertRaisesRegex(nemotron.APITimeoutError, "deadline of 9 s"):
            self.deadline_client(self.serve(drip), 9).chat("x")
        drip = sse(*[delta("a")] * 50, done=False, end="stall")
        with self.assertRaises(nemotron.IncompleteReplyError) as caught:
            self.deadline_client(self.serve(drip), 9).stream("x").completion()
        self.assertTrue(1 < len(caught.exception.partial.text) < 9)
        self.assertIn("deadline of 9 s", str(caught.exception))
        server = self.serve(answer("busy", status=429, headers={"Retry-After": "20"}))
        client = self.deadline_client(server, 15)
        with self.assertRaises(nemotron.RateLimitError):
            client.chat("x")
        self.assertEqual((client.slept, len(server.requests)), ([], 1))

    @quiet
    def test_deadline_of_dripping_headers(self):
        raw = b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(90))
        for path in ("chat", "stream"):
            dripped, enough = [], threading.Event()
            with socket.create_server(("127.0.0.1", 0)) as listener:
                def drip(listener=listener, dripped=dripped, enough=enough):
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        for i in range(len(raw)):
                            connection.sendall(raw[i : i + 1])
                            dripped.append(i)
                            enough.wait(0.02)

                thread = threading.Thread(target=drip)
                thread.start()
                client = nemotron.Client(
                    base_url=f"http://127.0.0.1:{listener.getsockname()[1]}",
                    deadline=0.3)
                with self.subTest(path), self.assertRaises(nemotron.APITimeoutError):
                    getattr(client, path)("x")
                self.assertLess(len(dripped), len(raw))
                enough.set()
                thread.join(30)

    def test_deadline_bounds_the_silence_of_an_attempt(self):
        server = self.serve(answer(end="stall", framing="close"))
        client = server.client(timeout=600, deadline=0.3)
        with self.assertRaises(nemotron.APITimeoutError):
            client.chat("x")


# ----------------------------------------------------------------------------- Settings


class SettingsTests(Case):
    def test_bad_settings(self):
        for setting in (
                {"timeout": 0}, {"timeout": -1}, {"timeout": "5"}, {"timeout": True},
                {"timeout": float("inf")}, {"deadline": 0}, {"retries": -1},
                {"retries": 1.5}, {"model": 5}, {"token": 5}, {"token": b"x"},
                {"base_url": 5}, {"base_url": "api.example.com"}, {"base_url": "ftp://x/v1"},
                {"base_url": "file:///etc/passwd"}, {"base_url": "http://example.com/v1"},
                {"base_url": "http://127.0.0.1.example.com"}, {"base_url": "https://"},
                {"base_url": "http://localhost.example.com"}, {"base_url": "https://a b/"},
                {"base_url": "https://user:secret@x/"}, {"base_url": "https://x/?a=b"},
                {"base_url": "https://x/#a"}, {"base_url": "https://x:port/"},
                {"base_url": "https://x\r\n/"}, {"base_url": "http://10.0.0.1/"}):
            with self.subTest(setting):
                words = self.refused(nemotron.Client, **setting)
                self.assertNotIn("secret", words)
        for url in ("https://x", "https://x/v1/", "http://localhost:1", "http://127.9.9.9",
                    "http://[::1]:8/v1", "HTTPS://X/v1"):
            with self.subTest(url):
                nemotron.Client(base_url=url)

    def test_environment(self):
        client = nemotron.Client()
        self.assertEqual((client.base_url, client.model, client.timeout),
                         (nemotron.BASE_URL, nemotron.MODEL, 600))
        server = self.serve(reply())
        self.setenv(DEEPINFRA_BASE_URL=server.url, NEMOTRON_MODEL="env-model",
                    DEEPINFRA_TOKEN=" ", DEEPINFRA_API_KEY="\tkey \n",
                    DEEPINFRA_API_TOKEN="other")
        self.assertEqual(nemotron.chat("x").text, "ok")
        request, = server.requests
        self.assertEqual(request.headers["authorization"], "Bearer key")
        self.assertEqual(request.json["model"], "env-model")
        nemotron.Client(token="given", model="given").chat("x", model="of the call")
        self.assertEqual(server.requests[1].headers["authorization"], "Bearer given")
        self.assertEqual(server.requests[1].json["model"], "of the call")
        self.setenv(DEEPINFRA_BASE_URL="nonsense")
        self.refused(nemotron.Client)

    def test_no_token(self):
        with self.assertRaises(nemotron.AuthenticationError) as caught:
            nemotron.chat("x")
        self.assertIsNone(caught.exception.status_code)
        server = self.serve(reply())
        self.assertEqual(nemotron.Client(base_url=server.url).chat("x").text, "ok")
        self.assertNotIn("authorization", server.requests[0].headers)

    def test_bad_tokens_are_neither_sent_nor_shown(self):
        server = self.serve(reply())
        for token in ("se\rcret", "se\ncret", "se\r\ncret", "se\0cret", "se\u00e9cret",
                      "se\x7fcret", "se\tcret", "\u2028secr\u2028et"):
            client = server.client(token=token)
            for call in (client.chat, client.stream, client.batch):
                with self.subTest(token), self.assertRaises(
                        nemotron.AuthenticationError) as caught:
                    call("x")
                self.assertNotIn("cret", repr(caught.exception))
        self.assertEqual(server.requests, [])

    @quiet
    def test_the_token_is_in_no_diagnostic(self):
        long = TOKEN * 30
        for token in (TOKEN, long, "shrt"):
            for name, what in (
                    ("body", answer(json.dumps({"error": f"bad key {token}"}), status=401)),
                    ("text", answer(f"{'x' * 280} {token}", status=500)),
                    ("clipped", answer(f"{token} " * 50 + token, status=500)),
                    ("not JSON", answer(f"your {token}!")),
                    ("error", answer(json.dumps({"error": token}))),
                    ("encoding", answer("x", headers={"Content-Encoding": token})),
                    ("location", answer("", status=302, headers={"Location": token})),
                    ("status line", answer("", status=f"x {token}")),
                    ("stream", sse(delta("a"), {"error": token})),
                    ("stream not JSON", sse(f"{{ {token}"))):
                client = self.serve(what).client(token=token)
                for call in (client.chat, client.stream):
                    with self.subTest(name), self.assertRaises(
                            nemotron.NemotronError) as caught:
                        list(call("x"))
                    error = caught.exception
                    while error is not None:
                        for shown in (str(error), repr(error), repr(error.args),
                                      str(getattr(error, "body", ""))):
                            self.assertNotIn(token[:10], shown)
                        error = error.__cause__
        self.assertNotIn(TOKEN[:10], "".join(self.logged.output))
        self.assertNotIn(TOKEN, repr(nemotron.Client(token=TOKEN)))

    def test_a_short_token_spoils_no_words(self):
        client = self.serve(answer("next exit: x", status=400)).client(token="x")
        with self.assertRaisesRegex(nemotron.APIStatusError, r"next exit: \[token\]"):
            client.chat("x")

    def test_proxies(self):
        proxy, server = self.serve(answer("", status=407)), self.serve(reply())
        address = f"http://127.0.0.1:{proxy.port}"
        self.setenv(http_proxy=address, https_proxy=address, ALL_PROXY=address)
        self.assertEqual(server.client().chat("x").text, "ok")
        self.assertEqual(proxy.requests, [])
        client = nemotron.Client(token=TOKEN, base_url="https://x.invalid/v1", retries=0)
        with self.assertRaisesRegex(nemotron.APIConnectionError, "407"):
            client.chat("x")
        client.deadline = 60
        with self.assertRaisesRegex(nemotron.APIConnectionError, "407"):
            client.chat("x")
        self.assertEqual(len(proxy.requests), 2)
        for request in proxy.requests:
            self.assertEqual((request.method, request.path), ("CONNECT", "x.invalid:443"))
            self.assertNotIn("authorization", request.headers)
        self.setenv(https_proxy="socks5://127.0.0.1:1")
        client = nemotron.Client(token=TOKEN, base_url="https://x.invalid/v1")
        with self.assertRaisesRegex(nemotron.APIConnectionError, "SOCKS"):
            client.chat("x")

    def test_one_opener_for_the_life_of_a_client(self):
        server = self.serve(reply())
        client = server.client()
        self.assertIsNone(client._opener)
        client.chat("x")
        first = client._opener
        threads = [threading.Thread(target=client.chat, args=("x",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertIs(client._opener, first)
        self.assertEqual(len(server.requests), 9)

    def test_without_ssl(self):
        code = ("import sys; sys.modules['ssl'] = sys.modules['_ssl'] = None; import nemotron;"
                "sys.exit(nemotron.main(['-n', *sys.argv[1:]]))")

        def run(*args):
            return subprocess.run([sys.executable, "-c", code, *args], cwd=HERE, timeout=60,
                                  env=environment(DEEPINFRA_TOKEN="x"), capture_output=True)

        done = run("x")
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"without the ssl module", done.stderr)
        self.assertEqual(run("--offline", "x").stdout, b"x\n")


# Of nobody but this test: for 127.0.0.1, until 2120.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg/lGg29K3rFLhDcfT
prbkBaBQSWyxEtddPAxhzPh1JHChRANCAAQgZ51D78nULeF0nUKvdx0p3mlSHOjK
6BbOcRaXPFyIaaVgvWZ6Or0PkUZ2O9F+8k+0MAoX/2RyGTqxuYFkGpUY
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBjjCCATOgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAkxMjcuMC4w
LjEwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CTEyNy4wLjAuMTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABCBnnUPvydQt4XSd
Qq93HSneaVIc6MroFs5xFpc8XIhppWC9Zno6vQ+RRnY70X7yT7QwChf/ZHIZOrG5
gWQalRijdDByMA8GA1UdEQQIMAaHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAOBgNV
HQ8BAf8EBAMCAoQwHQYDVR0OBBYEFGWNeD5qFUtnuNRc7rh8a/y3JZ0MMB8GA1Ud
IwQYMBaAFGWNeD5qFUtnuNRc7rh8a/y3JZ0MMAoGCCqGSM49BAMCA0kAMEYCIQCw
McmU7yHKzbfMoXC/aFPIGo/XZl48wQVAF4gHK6uCXAIhAJduSLwoxyMlySJWIBAi
0SULWbPxBo+jT49yTti5hrBw
-----END CERTIFICATE-----
"""


class TLSTests(Case):
    def serve_tls(self, *answers):
        (self.folder / "certificate.pem").write_text(CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "certificate.pem")
        server = self.serve(*answers)
        server.tls = context
        server.url = server.url.replace("http:", "https:")
        return server

    def test_a_certificate_that_fails_is_not_tried_again(self):
        server = self.serve_tls(reply())
        with self.assertRaisesRegex(nemotron.APIConnectionError, "SSL_CERT_FILE"):
            server.client().chat("x")
        self.assertEqual(server.requests, [])

    def test_https(self):
        self.setenv(SSL_CERT_FILE=str(self.folder / "certificate.pem"))
        server = self.serve_tls(reply(), sse(delta("a"), END),
                                                sse(delta("a"), done=False, end="reset"), reply())
        client = server.client()
        self.assertEqual(client.chat("x").text, "ok")
        self.assertEqual(client.stream("x").completion().text, "a")
        with self.assertRaises(nemotron.IncompleteReplyError):
            client.stream("x").completion()
        self.assertEqual(server.client(deadline=60).chat("x").text, "ok")
        rows = list(client.batch("abc", jobs=3))
        self.assertEqual([row["error"] for row in rows], [None] * 3)


class OfflineTests(Case):
    def test_blocking_and_streamed(self):
        self.setenv(DEEPINFRA_TOKEN="x\ny", DEEPINFRA_BASE_URL="nonsense")
        with nemotron.offline() as client:
            for text in ("Hello!", "two  words\n and more\n", " ", "", "\u20ac </s> x", "</s>"):
                with self.subTest(text):
                    messages = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": text}]
                    whole = client.chat(messages)
                    self.assertEqual(whole.text, text)
                    self.assertEqual(whole.finish_reason, "stop")
                    self.assertEqual(whole.usage["total_tokens"],
                                     whole.usage["prompt_tokens"]
                                     + whole.usage["completion_tokens"])
                    streamed = client.stream(messages).completion()
                    self.assertEqual(streamed.text, text)
                    for volatile in ("id", "created"):
                        del whole[volatile], streamed[volatile]
                    self.assertEqual(streamed, whole)
            self.assertEqual(len(client.chat("x", n=3)["choices"]), 3)
            self.assertEqual(len(client.stream("x", n=3).completion()["choices"]), 3)
            rows = list(client.batch(["a", "b"]))
            self.assertEqual({row["custom_id"] for row in rows}, {"line-1", "line-2"})


# ------------------------------------------------------------------------------- Batch


def echo_custom(request):
    """Answers with the last message, at a cost of 0.25."""
    return reply(request.json["messages"][-1]["content"])


class BatchTests(Case):
    def test_rows(self):
        server = self.serve(lambda request: {
            "bad": answer('{"error": "no"}', status=422, headers={"x-request-id": "r"}),
            "html": answer("<title>x</title>"), "cut": answer("{", end="short"),
        }.get(request.json["messages"][-1]["content"]) or echo_custom(request))
        requests = ["a", {"custom_id": "b", "prompt": "B"}, 5, {"prompt": "c", "top_p": 0},
                    {"custom_id": "b", "prompt": "again"}, "bad", "html", "cut",
                    {"custom_id": "line-10", "prompt": "taken"}, "j"]
        rows = {}
        for row in server.client(retries=0).batch(iter(requests), jobs=3):
            self.assertEqual(set(row), {"id", "custom_id", "response", "error"})
            rows.setdefault(row["custom_id"], []).append(row)
        self.assertEqual(sum(map(len, rows.values())), len(requests))
        codes = {name: sorted((row["error"] or {}).get("code", "") for row in group)
                 for name, group in rows.items()}
        self.assertEqual(codes, {
            "line-1": [""], "b": ["", "duplicate_custom_id"], "line-3": ["invalid_request"],
            "line-4": ["invalid_request"], "line-6": ["api_status"], "line-7": ["reply"],
            "line-8": ["connection"], "line-10": ["", "duplicate_custom_id"]})
        self.assertEqual(rows["line-1"][0]["response"]["body"], completion("a"))
        self.assertEqual(rows["line-6"][0]["response"], {
            "status_code": 422, "request_id": "r", "body": {"error": "no"}})
        self.assertEqual(rows["line-7"][0]["response"]["status_code"], 200)
        self.assertIsNone(rows["line-8"][0]["response"])
        self.assertIsNone(rows["line-3"][0]["response"])
        self.assertEqual(len({row["id"] for group in rows.values() for row in group}), 10)

    def test_lazy_and_at_most_jobs_in_flight(self):
        server, taken = self.serve(echo_custom), []

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
        for thread in threading.enumerate():  # what was in flight may end
            if thread.name == "nemotron":
                thread.join(30)
        self.assertLessEqual(server.most, 5)
        self.assertLessEqual(len(server.requests), 45)

    def test_rows_come_while_the_source_is_slow(self):
        server, go = self.serve(echo_custom), threading.Event()
        self.addCleanup(go.set)

        def slow():
            yield "a"
            yield "b"
            go.wait(30)
            yield "c"

        rows = server.client().batch(slow(), jobs=4)
        first = {next(rows)["custom_id"], next(rows)["custom_id"]}
        self.assertEqual(first, {"line-1", "line-2"})
        self.assertFalse(go.is_set())
        go.set()
        self.assertEqual([row["custom_id"] for row in rows], ["line-3"])

    def test_what_the_source_raises_comes_after_the_rows(self):
        def broken():
            yield "a"
            yield "b"
            raise LookupError("of the caller")

        rows, names = self.serve(echo_custom).client().batch(broken(), jobs=2), set()
        with self.assertRaisesRegex(LookupError, "of the caller"):
            for row in rows:
                names.add(row["custom_id"])
        self.assertEqual(names, {"line-1", "line-2"})

    @quiet
    def test_a_named_wait_holds_back_all_workers(self):
        held, clock = threading.Event(), [0.0]

        def busy(request):
            if not held.is_set():
                held.set()
                return answer("busy", status=429, headers={"Retry-After": "60"})
            return echo_custom(request)

        server = self.serve(busy)
        client = server.client()
        client._clock = lambda: clock[0]
        batch = nemotron.Batch(client, enumerate(map(str, range(50)), 1), 4, {})
        batch._halt.wait = lambda seconds: (
            waits.append(seconds), clock.__setitem__(0, clock[0] + seconds))[0]
        waits = []
        rows = list(batch.rows())
        self.assertEqual([row["error"] for row in rows], [None] * 50)
        self.assertIn(60.0, waits)
        self.assertGreaterEqual(clock[0], 60)
        self.assertEqual(len(server.requests), 51)

    def test_a_refused_token_ends_the_batch_and_loses_no_row(self):
        full, refused = threading.Semaphore(0), threading.Event()

        def refuse(request):
            if request.json["messages"][0]["content"] != "1":
                full.release()
                refused.wait(30)
                return echo_custom(request)
            for _ in range(3):
                full.acquire(timeout=30)
            refused.set()
            return answer('{"detail": "no"}', status=401)

        server, rows = self.serve(refuse), []
        source = map(str, itertools.count())
        with self.assertRaises(nemotron.AuthenticationError) as caught:
            for row in server.client().batch(source, jobs=4):
                rows.append(row)
        self.assertEqual(caught.exception.status_code, 401)
        self.assertEqual(len(rows), len(server.requests))
        self.assertEqual([row["error"]["code"] for row in rows if row["error"]],
                         ["authentication"])

    def test_a_blocked_source_does_not_hold_up_the_end(self):
        never = threading.Event()
        self.addCleanup(never.set)

        def source():
            yield "a"
            never.wait(60)

        server = self.serve(answer("no", status=403))
        with self.assertRaises(nemotron.AuthenticationError):
            list(server.client().batch(source(), jobs=3))
        self.assertFalse(never.is_set())

    def test_jobs_and_token_are_checked_at_once(self):
        for jobs in (0, 201, 1.0, True, "8"):
            with self.subTest(jobs):
                self.refused(nemotron.Client(token="x").batch, ["a"], jobs=jobs)
        with self.assertRaises(nemotron.AuthenticationError):
            nemotron.batch(["a"])
        self.assertEqual(list(self.serve(reply()).client().batch([], jobs=200)), [])

    @quiet
    def test_six_retries(self):
        server = self.serve(answer("busy", status=500))
        client = server.client()
        batch = nemotron.Batch(client, [(1, "a")], 1, {})
        batch._wait = lambda seconds, failure=None: None
        row, = batch.rows()
        self.assertEqual((row["error"]["code"], len(server.requests)), ("api_status", 7))
        self.assertEqual(row["response"]["status_code"], 500)


class BatchProgramTests(Case):
    def setUp(self):
        super().setUp()
        self.rows = self.folder / "rows.jsonl"
        self.requests = self.folder / "requests.jsonl"

    def write(self, *requests):
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in requests]
        self.requests.write_bytes(b"\n".join(lines) + b"\n")

    def run_batch(self, server, *args, **kwargs):
        kwargs.setdefault("env", {"DEEPINFRA_TOKEN": TOKEN})
        return program("--batch", self.requests, "--base-url", server.url, *args, **kwargs)

    def read(self):
        return [json.loads(line) for line in self.rows.read_bytes().splitlines()]

    def test_lines(self):
        server = self.serve(echo_custom)
        self.write(b"\xef\xbb\xbf" + b'"one"', b"", b"{oops", b"[1]", b'"\xff"', b"  ",
                   {"prompt": "two", "temperature": 1}, b'{"custom_id": "x"}\r',
                   {"custom_id": "x", "prompt": "three"}, b'{"prompt": "n", "y": NaN}')
        status, out, err = self.run_batch(server, "-s", "S", "-m", "M", "--temperature",
                                          "0.5", "-o", "z", "5", "-j", "1")
        self.assertEqual(status, 1)
        rows = {}
        for line in out.splitlines():
            row = json.loads(line)
            rows.setdefault(row["custom_id"], []).append((row["error"] or {}).get("code"))
        bad = ["invalid_request"]
        self.assertEqual(rows, {"line-1": [None], "line-3": bad, "line-4": bad,
                                "line-5": bad, "line-7": [None], "x": [
                                    "invalid_request", "duplicate_custom_id"],
                                "line-10": bad})
        one, two = (request.json for request in server.requests)
        self.assertEqual(one, {
            "model": "M", "temperature": 0.5, "z": 5, "messages": [
                {"role": "system", "content": "S"}, {"role": "user", "content": "one"}]})
        self.assertEqual(two["temperature"], 1)
        self.assertRegex(err, r"^nemotron: 8 done, 6 failed, .*\$0\.5, \d+\.\d s\n$")

    def test_standard_input_and_dry_run(self):
        server = self.serve(echo_custom)
        for word in ("a", "b"):
            status, out, _ = program("--dry-run", "-n", "--seed", "5", word)
            self.assertEqual((status, json.loads(out)["stream"]), (0, True))
            with self.requests.open("a") as file:
                file.write(out)
        status, out, err = program("--batch", "-", "--base-url", server.url,
                                   stdin=self.requests.read_bytes())
        self.assertEqual(status, 0, err)
        self.assertEqual({json.loads(line)["response"]["body"]["choices"][0]["message"][
            "content"] for line in out.splitlines()}, {"a", "b"})
        self.assertNotIn("stream", server.requests[0].json)

    def test_checkpoint(self):
        self.write(*({"custom_id": str(i), "prompt": str(i)} for i in range(6)))
        sick = {"2", "4"}
        server = self.serve(lambda request: (
            answer("no", status=400) if request.json["messages"][0]["content"] in sick
            else echo_custom(request)))
        status, out, err = self.run_batch(server, "--output", self.rows)
        self.assertEqual((status, out), (1, ""))
        self.assertEqual(len(self.read()), 6)
        sick.clear()
        whole = self.rows.read_bytes()
        self.rows.write_bytes(whole + whole.splitlines()[0][:-20])  # torn
        server.requests.clear()
        status, _, err = self.run_batch(server, "--output", self.rows)
        self.assertEqual(status, 0, err)
        self.assertIn("4 of them before", err)
        self.assertEqual({r.json["messages"][0]["content"] for r in server.requests},
                         {"2", "4"})
        self.assertTrue(self.rows.read_bytes().startswith(whole))
        answered = sorted(row["custom_id"] for row in self.read() if not row["error"])
        self.assertEqual(answered, list("012345"))
        server.requests.clear()
        self.assertEqual(self.run_batch(server, "--output", self.rows)[0], 0)
        self.assertEqual(server.requests, [])

    def test_torn_ends(self):
        self.write({"custom_id": "a", "prompt": "x"})
        row = nemotron.to_json({"id": "batch_req_1", "custom_id": "a", "response": {
            "status_code": 200, "request_id": None, "body": completion()}, "error": None})
        for tail, sent in ((b"{", 1), (b'{"id": "batch_req_1', 1), (row[:-1], 1), (row, 0)):
            server = self.serve(echo_custom)
            self.rows.write_bytes(tail)
            with self.subTest(tail):
                self.assertEqual(self.run_batch(server, "--output", self.rows)[0], 0)
                self.assertEqual(len(server.requests), sent)
                self.assertEqual([r["custom_id"] for r in self.read()], ["a"])

    def test_a_file_of_something_else_is_refused_untouched(self):
        self.write("x")
        server = self.serve(reply())
        for text in (b"hello", b"hello\n", b'{"prompt": "x"}\n', b'{"a": 1}', b"\n", b"[]\n",
                     b'{"id": "other', b'{"id": "batch_req_1", "mine": 1}',
                     self.requests.read_bytes()):
            self.rows.write_bytes(text)
            with self.subTest(text):
                status, _, err = self.run_batch(server, "--output", self.rows)
                self.assertEqual(status, 2)
                self.assertRegex(err, r"^nemotron: .*rows\.jsonl: line 1 is no row\n$")
                self.assertEqual(self.rows.read_bytes(), text)
        for path in (self.folder, "/dev/null", "/dev/stdout"):
            self.assertEqual(self.run_batch(server, "--output", path)[0], 2)
        self.assertEqual(server.requests, [])

    def test_a_duplicate_stays_an_error_when_resumed(self):
        self.write({"custom_id": "a", "prompt": "x"}, {"custom_id": "a", "prompt": "y"})
        server = self.serve(echo_custom)
        for _ in range(2):
            self.assertEqual(self.run_batch(server, "--output", self.rows)[0], 1)
        self.assertEqual(len(server.requests), 1)
        codes = sorted((row["error"] or {}).get("code", "") for row in self.read())
        self.assertEqual(codes, ["", "duplicate_custom_id", "duplicate_custom_id"])

    @unittest.skipUnless(POSIX, "kill -9")
    def test_kill_9_again_and_again(self):
        count, sent = 60, collections.Counter()
        lock, steps = threading.Lock(), threading.Semaphore(0)
        self.write(*({"custom_id": str(i), "prompt": str(i)} for i in range(count)))

        def counted(request):
            with lock:
                sent[request.json["messages"][0]["content"]] += 1
            steps.release()
            return echo_custom(request)

        server = self.serve(counted)
        args = [sys.executable, HERE / "nemotron.py", "--batch", self.requests, "-j", "4",
                "--output", self.rows, "--base-url", server.url]
        for _ in range(4):
            process = subprocess.Popen(args, env=environment(), stderr=subprocess.DEVNULL)
            for _ in range(10):
                steps.acquire(timeout=30)
            before = self.rows.read_bytes()
            process.kill()
            process.wait()
            answered = {row["custom_id"] for row in map(
                read_row, before.splitlines(keepends=True)) if row}
            with lock:
                known = {name: sent[name] for name in answered}
        self.assertEqual(self.run_batch(server, "--output", self.rows)[0], 0)
        names = [row["custom_id"] for row in self.read()]
        self.assertEqual(sorted(names, key=int), [str(i) for i in range(count)])
        self.assertEqual({name: sent[name] for name in known}, known)  # not sent again

    @unittest.skipUnless(POSIX, "flock")
    def test_two_runs_on_one_file(self):
        self.write("x")
        go = threading.Event()
        self.addCleanup(go.set)
        server = self.serve(lambda request: (go.wait(30), reply())[1])
        first = subprocess.Popen(
            [sys.executable, HERE / "nemotron.py", "--batch", self.requests, "--output",
             self.rows, "--base-url", server.url], env=environment(),
            stderr=subprocess.PIPE)
        while not server.requests:
            time.sleep(0.01)
        status, _, err = self.run_batch(server, "--output", self.rows)
        self.assertEqual(status, 2)
        self.assertIn("another run is writing to it", err)
        go.set()
        first.communicate()
        self.assertEqual((first.returncode, len(self.read())), (0, 1))

    def test_max_cost(self):
        self.write(*"abcdefgh")
        server = self.serve(echo_custom)
        status, out, err = self.run_batch(server, "--max-cost", "0.75", "-j", "1",
                                          "--output", self.rows)
        self.assertEqual((status, len(server.requests)), (3, 3))
        self.assertIn("3 done", err)
        self.assertIn("stopped by --max-cost", err)
        status, _, err = self.run_batch(server, "--output", self.rows, "--max-cost", "1.25")
        self.assertEqual(status, 0, err)  # the last one reached it, and none is left
        free = self.serve(answer(json.dumps({"choices": [{"message": {}}]})))
        status, _, err = self.run_batch(free, "--max-cost", "0.1")
        self.assertEqual((status, len(free.requests)), (0, 8))
        self.assertIn("8 replies without a cost", err)

    def test_statuses(self):
        self.write("a", "b")
        cut = self.serve(reply("x", "length"))
        status, _, err = self.run_batch(cut, "--output", self.rows)
        self.assertEqual(status, 3)
        self.assertIn("2 cut short", err)
        self.assertEqual(self.run_batch(cut, "--output", self.rows)[0], 3)
        self.assertEqual(len(cut.requests), 2)
        no = self.serve(answer("no", status=402))
        status, out, err = self.run_batch(no)
        self.assertEqual(status, 4)
        self.assertIn("HTTP 402", err)
        self.assertEqual(len(err.splitlines()), 2)  # the summary, and why
        for args in (["--jobs", "0"], ["--jobs", "x"], ["--max-cost", "-1"], ["word"],
                     ["--temperature", "3"], ["-c", "x"], ["-i"], ["--dry-run"]):
            with self.subTest(args):
                self.assertEqual(self.run_batch(cut, *args)[0], 2)
        self.assertEqual(program("--batch", self.folder / "none")[0], 4)  # no token
        status, _, err = program("--batch", self.folder / "none",
                                 env={"DEEPINFRA_TOKEN": "x"})
        self.assertEqual((status, "No such file" in err), (2, True))
        self.assertEqual(program("-n", "x", "--output", self.rows)[0], 2)

    @unittest.skipUnless(POSIX, "signals")
    def test_ctrl_c_keeps_the_finished_rows(self):
        for source in ("file", "-"):
            gate = threading.Event()
            self.addCleanup(gate.set)
            self.write(*"abcdef")
            self.rows.unlink(missing_ok=True)

            def some(request, gate=gate):
                if request.json["messages"][0]["content"] > "c":
                    gate.wait(30)
                return echo_custom(request)

            server = self.serve(some)
            process = subprocess.Popen(
                [sys.executable, HERE / "nemotron.py", "--batch", source if source == "-"
                 else self.requests, "--output", self.rows, "--base-url", server.url],
                env=environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
            process.stdin.write(self.requests.read_bytes())
            process.stdin.flush()
            with self.subTest(source):
                while len(server.requests) < 6 or len(self.rows.read_bytes().splitlines()) < 3:
                    time.sleep(0.01)
                process.send_signal(signal.SIGINT)
                err = process.stderr.read().decode()
                self.assertEqual(process.wait(30), 130)
                self.assertEqual({row["custom_id"] for row in self.read()},
                                 {"line-1", "line-2", "line-3"})
                self.assertRegex(err, r"^nemotron: 3 done, 0 failed.*\n$")
                self.assertFalse(gate.is_set())
            process.stdin.close()
            process.stderr.close()

    @unittest.skipUnless(POSIX, "pipes")
    def test_head(self):
        self.write(*map(str, range(200)))
        server = self.serve(echo_custom)
        process = subprocess.Popen(
            [sys.executable, HERE / "nemotron.py", "--batch", self.requests, "--base-url",
             server.url], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read().decode()
        process.stderr.close()
        self.assertEqual(process.wait(30), 141)
        self.assertRegex(err, r"^nemotron: \d+ done, .*\n$")
        self.assertLess(len(server.requests), 200)


def read_row(line):
    return json.loads(line) if line.endswith(b"\n") else None


# ------------------------------------------------------------------------ Command line


class ProgramTests(Case):
    def setUp(self):
        super().setUp()
        self.server = self.serve(echo_custom)
        self.setenv(DEEPINFRA_BASE_URL=self.server.url)
        self.env = {"DEEPINFRA_BASE_URL": self.server.url}

    def sent(self, *args, stdin=""):
        """The body that main() sends, as --dry-run prints it."""
        status, out, err = main("--dry-run", *args, stdin=stdin)
        self.assertEqual((status, err), (0, ""))
        return json.loads(out)

    def prompt(self, *args, stdin=""):
        return self.sent(*args, stdin=stdin)["messages"][-1]["content"]

    def test_prompt(self):
        for args, stdin, expected in (
                (["a", "b"], "", "a b"), (["a"], "text\n\n", "a\n\ntext"),
                ([], "\ufefftext\r\n", "text"), (["-", "b"], "text", "text\n\nb"),
                (["a", "-", "b", "c"], "text", "a\n\ntext\n\nb c"),
                (["-n", "a", "-"], "text", "a -"), (["a", "-s", "x", "b"], "", "a b"),
                (["--", "-x", "y"], "", "-x y"), (["- a list", "b"], "", "- a list b"),
                ([], " in\nside \n", " in\nside "), (["-"], "text", "text")):
            with self.subTest(args, stdin=stdin):
                if stdin.startswith("\ufeff"):
                    status, out, _ = program("--dry-run", *args, stdin=stdin.encode())
                    got = json.loads(out)["messages"][-1]["content"]
                else:
                    got = self.prompt(*args, stdin=stdin)
                self.assertEqual(got, expected)

    def test_options_of_the_table(self):
        values = {"tool_choice": "auto", "user": "me", "stop": ["a", "b"]}
        args, expected = [], {}
        for row in nemotron.PARAMETERS:
            if row.name in ("n", "tools", "response_format"):
                continue
            value = values.get(row.name, 0.5 if row.kind == "a number" else 1)
            for one in value if isinstance(value, list) else [value]:
                args += ["--" + row.name.replace("_", "-"), one]
            expected[row.name] = value
        body = self.sent(*args, "x")
        for name, value in expected.items():
            self.assertEqual(body[name], value, name)
        helped = main("-h")[1]
        flags = re.findall(r"^  --([a-z-]+) (?:X|TEXT)", helped, re.M)
        self.assertEqual([f.replace("-", "_") for f in flags], list(expected))
        for name in ("--n", "--tools", "--temp", "--max"):
            self.assertEqual(main(name, "1", "x")[0], 2, name)

    def test_option_key_value(self):
        body = self.sent("-o", "logprobs", "true", "-o", "x", "te xt", "-o", "n", "2",
                         "-o", "response_format", '{"type": "json_object"}',
                         "-o", "temperature", "0.5", "-o", "y", '{"a": [1]}', "x")
        self.assertEqual({k: body[k] for k in ("logprobs", "x", "n", "temperature", "y")}, {
            "logprobs": True, "x": "te xt", "n": 2, "temperature": 0.5, "y": {"a": [1]}})
        self.assertEqual(self.sent("-o", "y", "NaN", "x")["y"], "NaN")
        for bad in (["n", "9"], ["tools", "x"], ["messages", "[]"], ["model", "x"],
                    ["stream", "true"], ["temperature", "hot"]):
            with self.subTest(bad):
                status, out, err = main("-n", "-o", *bad, "x")
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err, r"^nemotron: [^\n]+\n$")
        self.assertEqual(main("-n", "-o", "n", "2", "x")[0], 2)
        self.assertEqual(main("-n", "-o", "n", "2", "--json", "x")[0], 0)

    def test_usage_errors_send_nothing(self):
        for args in (["--temperature", "3", "x"], ["--top-k", "1.5", "x"], ["--nonsense"],
                     ["--seed", "-1", "x"], ["--timeout", "0", "x"], ["--retries", "x", "x"],
                     ["--deadline", "soon", "x"], ["--top-p", "null", "x"], ["--base-url", "ftp://x", "x"], [],
                     ["-i", "--dry-run"], ["-j", "5", "x", "--max-cost", "5"], ["-s"]):
            with self.subTest(args):
                status, out, err = main(*args)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err, r"^nemotron: [^\n]{1,289}\n$")
        self.assertEqual(self.server.requests, [])

    def test_reply(self):
        for text, shown in (("  \n hi", "hi\n"), ("hi\n\n\n", "hi\n"), ("", "\n"),
                            ("a\n\n b\n", "a\n\n b\n"), ("a\r\n\r\n", "a\n"), ("\x1b[2J\r\t\u20ac", "\x1b[2J\r\t\u20ac\n"),
                            ("half \ud83d", "half \ufffd\n"), ("\ude00 half", "\ufffd half\n")):
            chunks = [delta(c) for c in text] + [END]
            for args, what in (([], sse(*chunks)), (["--no-stream"], reply(text))):
                server = self.serve(what)
                for call in (main, program):
                    with self.subTest(text, args=args, call=call.__name__):
                        self.assertEqual(call("--base-url", server.url, "-n", *args, "x"),
                                         (0, shown, ""))
        pair = self.serve(sse(delta("\ud83d"), delta("\ude00"), END))
        status, out, _ = program("-n", "x", "--base-url", pair.url,
                                 env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
        self.assertEqual((status, out), (0, "\U0001f600\n"))

    def test_json_and_usage(self):
        status, out, err = main("--json", "-u", "-n", "a", "b")
        self.assertEqual((status, json.loads(out)), (0, completion("a b")))
        self.assertEqual(out.count("\n"), 1)
        self.assertRegex(err, r"^nemotron: 3 \+ 2 tokens, \$0\.25, \d+\.\d s, model m\n$")
        _, _, err = main("-u", "-n", "-m", "m", "a")
        self.assertRegex(err, r"^nemotron: 3 \+ 2 tokens, \$0\.25, \d+\.\d s\n$")
        none = self.serve(sse(delta("a", "stop")))
        _, _, err = main("-u", "-n", "a", "--base-url", none.url, "-m", "m")
        self.assertRegex(err, r"^nemotron: \? \+ \? tokens, cost unknown, ")

    @quiet
    def test_statuses(self):
        part = [delta("part")]
        for name, what, status, out, words in (
                ("length", reply("a", "length"), 3, "a\n", "stopped at length"),
                ("filter", reply("a", "content_filter"), 3, "a\n", "content_filter"),
                ("cut", sse(*part, done=False), 3, "part\n", "stopped before its end"),
                ("error", sse(*part, {"error": "Boom"}), 1, "part\n", "Boom"),
                ("nothing", sse(), 1, "", "no reply"),
                ("400", answer('{"error": "bad"}', status=400), 1, "", "HTTP 400: bad"),
                ("401", answer('{"detail": "no"}', status=401), 4, "", "DEEPINFRA_TOKEN"),
                ("402", answer("", status=402), 4, "", "billing"),
                ("403", answer("", status=403), 4, "", "HTTP 403"),
                ("429", answer("Rate limited", status=429), 5, "", "Rate limited"),
                ("503", answer("<title>Down</title>", status=503), 5, "", "Down"),
                ("502", answer("", status=502), 1, "", "HTTP 502"),
                ("long", answer("long " * 500, status=400), 1, "", "HTTP 400")):
            server = self.serve(what)
            with self.subTest(name):
                got = main("-n", "x", "--retries", "0", "--base-url", server.url)
                self.assertEqual(got[:2], (status, out))
                self.assertRegex(got[2], r"^nemotron: [^\n]{1,289}\n$")
                self.assertIn(words, got[2])
        del os.environ["DEEPINFRA_BASE_URL"]
        self.assertEqual(main("-n", "x")[0], 4)

    def test_the_program_itself(self):
        self.assertEqual(main("--version"), (0, nemotron.__version__ + "\n", ""))
        status, out, err = main("-h")
        self.assertEqual((status, err), (0, ""))
        self.assertTrue(out.rstrip().endswith(nemotron.EXITS))
        shutil.copy(HERE / "nemotron.py", self.folder)
        source = (HERE / "nemotron.py").read_bytes()
        for args, stdin in ((["-I", "-S", "nemotron.py"], b""), (["nemotron.py"], b""),
                            (["-"], source), (["-m", "nemotron"], b"")):
            with self.subTest(args):
                done = subprocess.run(
                    [sys.executable, *args, "--offline", "Hello!"], input=stdin,
                    cwd=self.folder, env=environment(), capture_output=True, timeout=60)
                self.assertEqual((done.returncode, done.stdout, done.stderr),
                                 (0, b"Hello!\n", b""))

    def test_import_is_quiet_and_small(self):
        code = ("import sys, urllib.request, json, threading; before = set(sys.modules);"
                "import nemotron; print(*sorted(set(sys.modules) - before))")
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                              env=environment(DEEPINFRA_BASE_URL="nonsense"), timeout=60)
        self.assertEqual(done.stdout.split(), [b"__future__", b"nemotron"])
        self.assertEqual(set(nemotron.__all__) - set(dir(nemotron)), set())

    @unittest.skipUnless(POSIX, "pipes")
    def test_pipes(self):
        def piped(command, **env):
            done = subprocess.run(
                ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True,
                env=environment(P=f"{sys.executable} {HERE / 'nemotron.py'}", **env),
                cwd=self.folder, timeout=60)
            return done.returncode, done.stdout.decode(), done.stderr.decode()

        long = self.serve(sse(*[delta("word\n" * 1000)] * 200, END))
        self.assertEqual(piped(f"$P -n x --base-url {long.url} | head -n 1"),
                         (141, "word\n", ""))
        with self.subTest("closed files"):
            self.assertEqual(piped("$P --offline x <&-"), (0, "x\n", ""))
            self.assertEqual(piped("$P -n --offline x 2>&-"), (0, "x\n", ""))
            status, _, err = piped("$P -n --offline x >&-")
            self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertEqual(piped("$P --offline x 0>/dev/null")[0], 2)
        long = self.serve(answer(json.dumps({"error": "\u00e9" * 400}), status=400))
        status, _, err = piped(f"$P -n x --base-url {long.url}", PYTHONIOENCODING="ascii")
        self.assertEqual((status, len(err)), (1, 300))
        if os.path.exists("/dev/full"):
            self.assertEqual(piped("$P -h > /dev/full")[0], 1)
            status, _, err = piped("$P -n --offline x > /dev/full")
            self.assertEqual(status, 1)
            self.assertRegex(err, r"^nemotron: standard output: .*space.*\n$")
        self.assertEqual(piped("printf 'a\\nb\\n' | while read -r w; do "
                               "$P -n --offline \"$w\"; done"), (0, "a\nb\n", ""))
        self.assertEqual(piped("printf 'a\\377' | $P --offline")[0], 2)
        status, _, err = piped("$P -n --offline $'\\377'")
        self.assertEqual((status, err), (2, "nemotron: the prompt is not UTF-8\n"))
        self.assertEqual(piped("(sleep 2.2; echo late) | $P --offline early"), (
            0, "early\n\nlate\n",
            "nemotron: waiting for standard input (-n leaves it alone)\n"))

    @unittest.skipUnless(POSIX, "signals")
    def test_ctrl_c_in_a_pipe(self):
        server = self.serve(sse(delta("part"), done=False, end="stall"))
        process = subprocess.Popen(
            [sys.executable, HERE / "nemotron.py", "-n", "x", "--base-url", server.url],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(process.stdout.read(4), b"part")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        self.assertEqual((process.returncode, out, err), (130, b"\n", b""))


# ----------------------------------------------------------- Conversations, terminals


class ConversationTests(Case):
    def setUp(self):
        super().setUp()
        self.server = self.serve(echo_custom)
        self.setenv(DEEPINFRA_BASE_URL=self.server.url)
        self.file = self.folder / "chat.json"

    def test_a_conversation(self):
        self.assertEqual(main("-n", "-c", self.file, "-s", "S", "one")[1], "one\n")
        if POSIX:
            self.assertEqual(self.file.stat().st_mode & 0o777, 0o600)
            self.file.chmod(0o640)
        self.assertEqual(main("-n", "-c", self.file, "two")[1], "two\n")
        self.assertEqual(main("-n", "-c", self.file, "-s", "T", "three", "--json")[0], 0)
        turns = [{"role": role, "content": word} for word in ("one", "two", "three")
                 for role in ("user", "assistant")]
        expected = [{"role": "system", "content": "T"}, *turns]
        self.assertEqual(json.loads(self.file.read_text()), expected)
        self.assertEqual(self.server.requests[-1].json["messages"], expected[:-1])
        if POSIX:
            self.assertEqual(self.file.stat().st_mode & 0o777, 0o640)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["chat.json"])

    @unittest.skipUnless(POSIX, "symbolic links")
    def test_a_symbolic_link_is_followed(self):
        (self.folder / "real").mkdir()
        self.file.symlink_to(self.folder / "real" / "there.json")
        for _ in range(2):
            self.assertEqual(main("-n", "-c", self.file, "x")[0], 0)
        self.assertTrue(self.file.is_symlink())
        self.assertEqual(len(json.loads(self.file.read_text())), 4)

    def test_untouched_unless_the_reply_has_ended(self):
        before = json.dumps([USER, ASSISTANT])
        self.file.write_text(before)
        for what in (answer("no", status=400), sse(delta("a"), done=False),
                     sse(delta("a"), {"error": "x"}), answer("<title>x</title>")):
            server = self.serve(what)
            self.assertNotEqual(main("-n", "-c", self.file, "x", "--base-url",
                                     server.url)[0], 0)
            self.assertEqual(self.file.read_text(), before)
        main("--dry-run", "-c", self.file, "x")
        self.assertEqual(self.file.read_text(), before)
        server = self.serve(reply("cut", "length"))
        self.assertEqual(main("-n", "-c", self.file, "x", "--base-url", server.url)[0], 3)
        self.assertEqual(json.loads(self.file.read_text())[-1]["content"], "cut")

    @unittest.skipUnless(POSIX, "signals")
    def test_untouched_by_signals(self):
        before = json.dumps([USER, ASSISTANT])
        self.file.write_text(before)
        server = self.serve(sse(delta("part"), done=False, end="stall"))
        for number in (signal.SIGINT, signal.SIGKILL):
            process = subprocess.Popen(
                [sys.executable, HERE / "nemotron.py", "-n", "-c", self.file, "x",
                 "--base-url", server.url], env=environment(), stdout=subprocess.PIPE)
            process.stdout.read(4)
            process.send_signal(number)
            process.communicate(timeout=30)
            self.assertEqual(self.file.read_text(), before)

    def test_bad_files(self):
        for text, words in (("", "chat.json"), ("{}", "not a list"), ('"x"', "not a list"),
                            ("[1]", "messages[0]"), (json.dumps([USER, {"role": "x"}]),
                                                     "messages[1]"),
                            ("[" * 100000, "chat.json"), ("[\xff", "chat.json"),
                            (json.dumps([SYSTEM, USER, SYSTEM]), "messages[2]")):
            self.file.write_text(text, encoding="latin-1")
            with self.subTest(text[:20]):
                status, _, err = main("-n", "-c", self.file, "-s", "x", "x")
                self.assertEqual(status, 2)
                self.assertRegex(err, r"^nemotron: [^\n]*chat\.json: [^\n]+\n$")
                self.assertIn(words, err)
                self.assertEqual(self.file.read_text(encoding="latin-1"), text)
        self.assertEqual(main("-n", "-c", self.folder, "x")[0], 2)
        self.assertEqual(main("-n", "-c", "", "x")[0], 2)
        self.assertEqual(main("-n", "-c", self.folder / "no" / "x", "x")[0], 2)
        self.assertEqual(self.server.requests, [])

    def test_a_chat_from_a_pipe(self):
        status, out, err = program("-i", "-c", self.file, "first", "turn", "-u",
                                   stdin="two\n\n \nthree \u20ac".encode(),
                                   env={"DEEPINFRA_BASE_URL": self.server.url})
        self.assertEqual((status, out), (0, "first turn\ntwo\nthree \u20ac\n"))
        self.assertEqual(err.count("tokens"), 3)
        self.assertEqual(len(json.loads(self.file.read_text())), 6)
        self.assertEqual(len(self.server.requests[-1].json["messages"]), 5)

    def test_words_alone(self):
        self.assertEqual(main("-i", "-n", "one", stdin="two\n"), (0, "one\n", ""))

    @unittest.skipUnless(POSIX, "folders without a way in")
    def test_a_file_that_cannot_be_written_ends_no_chat(self):
        def lose(request):
            shutil.rmtree(self.folder / "sub", ignore_errors=True)
            return echo_custom(request)

        (self.folder / "sub").mkdir()
        server = self.serve(lose)
        status, out, err = main("-i", "-c", self.folder / "sub" / "chat.json", "one",
                                "--base-url", server.url, stdin="two\n")
        self.assertEqual((status, out), (0, "one\ntwo\n"))
        self.assertEqual(err.count("No such file or directory"), 2)

    def test_an_error_drops_the_turn(self):
        server = self.serve(answer("maximum context length is 4096", status=400), echo_custom)
        status, out, err = main("-i", "one", "--base-url", server.url, stdin="two\n")
        self.assertEqual((status, out), (0, "two\n"))
        self.assertRegex(err, r"^nemotron: HTTP 400, .*new conversation.*\n$")
        self.assertEqual(len(server.requests[1].json["messages"]), 1)
        del os.environ["DEEPINFRA_BASE_URL"]
        self.assertEqual(main("-i", "one")[0], 4)
        self.assertEqual(main("-i", "one", "--top-p", "0")[0], 2)


class Terminal:
    """The program on a pseudo-terminal of its own, with Ctrl-C and all."""

    START = ("import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
             "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")

    def __init__(self, *args, stdout=None, code=None, **env):
        self.file, terminal = os.openpty()
        what = ["-c", code] if code else [HERE / "nemotron.py", *map(str, args)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.START, *what],
            stdin=terminal, stdout=stdout or terminal, stderr=terminal,
            start_new_session=True, env=environment(**{"TERM": "xterm", "COLUMNS": "80",
                                                       **env}))
        os.close(terminal)
        self.seen = ""

    def expect(self, text):
        """Wait until the text is on the screen; what is new up to it."""
        while text not in self.seen:
            with contextlib.suppress(OSError):  # the end, as Linux says it
                new = os.read(self.file, 4096).decode()
                if new:
                    self.seen += new
                    continue
            raise AssertionError(f"{text!r} did not come: {self.seen!r}")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def send(self, text):
        os.write(self.file, text.encode())

    def end(self):
        """(status, the rest of what was on the screen)"""
        rest = self.seen
        with contextlib.suppress(OSError):
            while new := os.read(self.file, 4096).decode():
                rest += new
        os.close(self.file)
        return self.process.wait(30), rest


@unittest.skipUnless(POSIX, "pseudo-terminals")
class TerminalTests(Case):
    def setUp(self):
        super().setUp()
        self.server = self.serve(echo_custom)
        self.guard = threading.Timer(50, os._exit, (9,))  # rather than hang for ever
        self.guard.start()
        self.addCleanup(self.guard.cancel)

    def terminal(self, *args, server=None, **kwargs):
        return Terminal(*args, DEEPINFRA_BASE_URL=(server or self.server).url, **kwargs)

    def test_a_chat(self):
        file = self.folder / "chat.json"
        screen = self.terminal("-i", "-u", "-c", file, "hello")
        screen.expect("hello\r\nnemotron: 3 + 2 tokens")
        screen.expect("> ")
        screen.send("one\r")
        screen.expect("one\r\n")
        screen.expect("one\r\nnemotron: 3 + 2 tokens")
        screen.expect("> ")
        self.assertEqual(len(json.loads(file.read_text())), 4)
        screen.send("\x1b[A\r")  # the line before, from the history
        screen.expect("one\r\nnemotron: 3 + 2")
        screen.expect("> ")
        screen.send("half a li\x03")  # Ctrl-C
        screen.expect("> ")
        screen.send("\x04")  # Ctrl-D
        self.assertEqual(screen.end()[0], 0)
        self.assertEqual(len(json.loads(file.read_text())), 6)

    def test_ctrl_c_during_a_reply_keeps_the_chat(self):
        server = self.serve(sse(delta("endless"), done=False, end="stall"), echo_custom)
        screen = self.terminal("-i", server=server)
        screen.expect("> ")
        screen.send("one\r")
        screen.expect("endless")
        screen.send("\x03")
        screen.expect("\r\nnemotron: stopped; this turn is dropped\r\n")
        screen.expect("> ")
        screen.send("two\r")
        screen.expect("two\r\ntwo\r\n")
        screen.expect("> ")
        screen.send("\x04")
        self.assertEqual(screen.end()[0], 0)
        self.assertEqual(len(server.requests[1].json["messages"]), 1)

    def test_ctrl_c_of_one_shot(self):
        server = self.serve(sse(delta("part"), done=False, end="stall"))
        screen = self.terminal("x", server=server)
        screen.expect("part")
        screen.send("\x03")
        self.assertEqual(screen.end(), (130, "^C\r\n"))

    def test_escapes_are_shown(self):
        text = "\x1b[31mred\x07\x9b2J\r\n\ttab\x7f"
        for args in ([], ["--no-stream"]):
            screen = self.terminal("x", *args, server=self.serve(reply(text)))
            self.assertEqual(screen.end(), (
                0, "\\x1b[31mred\\x07\\x9b2J\\x0d\r\n\ttab\\x7f\r\n"))

    def test_no_prompt(self):
        screen = self.terminal()
        status, seen = screen.end()
        self.assertEqual(status, 2)
        self.assertRegex(seen, r"^nemotron: no prompt: nemotron.py \[options\][^\n]*\r\n$")

    def test_input_from_the_terminal(self):
        screen = self.terminal("a", "-")
        screen.send("typed\r\x04")
        screen.expect("a\r\n\r\ntyped\r\n")
        self.assertEqual(screen.end()[0], 0)

    def test_prompt_is_not_in_a_redirected_output(self):
        with open(self.folder / "out", "wb") as out:
            screen = self.terminal("-i", stdout=out)
            screen.expect("> ")
            screen.send("one\r")
            screen.expect("> ")
            screen.send("\x04")
            screen.end()
        self.assertEqual((self.folder / "out").read_bytes(), b"one\n")

    def test_a_terminal_of_no_size(self):
        requests = self.folder / "requests.jsonl"
        requests.write_text('"a"\n')
        screen = self.terminal("--batch", requests, "--output", self.folder / "rows",
                               COLUMNS="0")
        status, rest = screen.end()
        self.assertEqual(status, 0)
        self.assertRegex(rest, r"nemotron: 1 of 1 done, 0 failed, .*s\r\n$")

    def test_a_chat_without_standard_error(self):
        for number in (1, 2):
            screen = self.terminal(code=(
                f"import os, sys; os.close({number});"
                f"os.execv(sys.executable, [sys.executable, {str(HERE / 'nemotron.py')!r},"
                " '-i', 'one'])"))
            if number == 2:
                screen.expect("one\r\n")
                screen.send("two\r")
                screen.expect("two\r\ntwo\r\n")
                screen.send("\x04")
            self.assertEqual(screen.end()[0], 0 if number == 2 else 2)

    def test_progress_of_a_batch(self):
        requests = self.folder / "requests.jsonl"
        requests.write_text('"a"\n' * 3)
        steps = threading.Semaphore(0)
        server = self.serve(lambda request: (steps.acquire(timeout=30), reply())[1])
        with open(self.folder / "out", "wb") as out:
            screen = self.terminal("--batch", requests, "-j", "1", server=server, stdout=out)
            steps.release()
            screen.expect("\r1 of 3 done, 0 failed, ")
            screen.expect("s left")
            steps.release()
            steps.release()
            status, rest = screen.end()
        self.assertEqual(status, 0)
        self.assertRegex(rest, r"\r {79}\rnemotron: 3 of 3 done, 0 failed, .*s\r\n$")
        self.assertEqual((self.folder / "out").read_bytes().count(b"\n"), 3)


# ------------------------------------------------------------------------ Documentation


class ReadmeTests(Case):
    README = (HERE / "README.md").read_text(encoding="utf-8")

    def blocks(self, language):
        found = re.findall(rf"^```{language}\n(.*?)^```", self.README, re.M | re.S)
        self.assertGreater(len(found), 3)
        return found

    def test_the_table_of_parameters(self):
        rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \| (.*) \|$", self.README, re.M)
        self.assertEqual(rows, [
            (row.name, row.kind, row.range and f"`{row.range}`", row.default, row.help)
            for row in nemotron.PARAMETERS])

    def test_the_codes_of_the_rows(self):
        codes = {getattr(nemotron, name).code for name in nemotron.__all__
                 if name.endswith("Error")} - {"error", "incomplete_reply"}
        text, = re.findall(r"Codes:(.*?)\.\n", self.README, re.S)
        self.assertEqual(set(re.findall(r"`(\w+)`", text)), codes | {"duplicate_custom_id"})

    def run_in_folder(self, args):
        done = subprocess.run(args, cwd=self.folder, env=self.env, capture_output=True,
                              stdin=subprocess.DEVNULL, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done.stdout.decode()

    def prepare(self):
        for name in ("nemotron.py", "README.md"):
            shutil.copy(HERE / name, self.folder)

        def both(request):
            text = request.json["messages"][-1]["content"]
            streamed = request.json.get("stream")
            return sse(delta(text), delta(finish="stop", usage=USAGE)) if streamed else (
                reply(text))

        self.env = environment(DEEPINFRA_BASE_URL=self.serve(both).url, DEEPINFRA_TOKEN="x")

    def test_the_python_examples(self):
        self.prepare()
        ran = [code for code in self.blocks("python") if "pyspark" not in code]
        for code in ran:
            with self.subTest(code):
                self.run_in_folder([sys.executable, "-W", "error", "-c", code])
        self.assertGreaterEqual(len(ran), 4)

    @unittest.skipUnless(all(map(shutil.which, ("bash", "jq", "curl", "git"))),
                         "bash, jq, curl and git")
    def test_the_shell_examples(self):
        self.prepare()
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "python3").symlink_to(sys.executable)
        self.env["PATH"] = f"{self.folder / 'bin'}:{self.env['PATH']}"
        self.run_in_folder(["bash", "-ec", "git init -q . && git add README.md && "
                            "echo more >> README.md"])
        outputs = []
        for code in self.blocks("sh"):
            if "unittest" not in code:
                with self.subTest(code):
                    outputs.append(self.run_in_folder(["bash", "-euo", "pipefail", "-c", code]))
        first, _, words, loop, jq, talk, batch, timed = outputs
        self.assertEqual(timed, first)
        self.assertEqual(first, "Hello!\n")
        self.assertIn("Write a commit message for this diff.\n\ndiff --git", words)
        self.assertIn("\n\nSay this again, for a child.\n", words)
        self.assertEqual(loop, "".join(f"How long do I roast {animal}?\n"
                                       for animal in ("lamb", "duck", "trout")))
        self.assertTrue(jq.startswith("Hello!\n5\n"))
        self.assertIn("data: [DONE]", jq)
        self.assertIn("assistant: And what goes with it?", talk)
        self.assertEqual(len(json.loads((self.folder / "chat.json").read_text())), 3)
        self.assertEqual(batch, "")
        pairs = [json.loads(line) for line in
                 (self.folder / "data.jsonl").read_text().splitlines()]
        self.assertEqual({pair["topic"] for pair in pairs}, {"lamb", "duck", "trout"})
        self.assertIn("Write a question about cooking lamb", str(pairs))

    def test_the_exit_statuses(self):
        known = re.findall(r"^\| ([\d, ]+) \| ", self.README, re.M)
        numbers = [int(n) for one in known for n in one.split(", ")]
        self.assertEqual(numbers, [int(n) for n in re.findall(
            r"^  (\d+) ", nemotron.EXITS, re.M)])


if __name__ == "__main__":
    unittest.main()
