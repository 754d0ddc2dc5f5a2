"""Tests of nemotron.py: the standard library, loopback only, nothing patched in urllib.

`Server` sends what a case says, byte for byte.  Nothing sleeps: a test waits for an
event, and a client from `Server.client` notes its waits in `slept` instead.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import email.utils
import functools
import http.client
import io
import itertools
import json
import logging
import os
import pathlib
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import warnings
from unittest import mock

import nemotron

ssl = readline = None
with contextlib.suppress(ImportError):
    import ssl
with contextlib.suppress(ImportError):
    import readline

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = [sys.executable, "-S", str(HERE / "nemotron.py")]  # it starts sooner so
TOKEN = 's3cret"token/of+tests=='
README = HERE / "README.md"
GNU_READLINE = sys.platform == "linux" and "GNU" in str(readline.__doc__)
PATIENCE = 60  # seconds; no test that passes waits so long
posix = unittest.skipIf(os.name == "nt", "needs POSIX")

# ---------------------------------------------------------------- The loopback server

Answer = collections.namedtuple("Answer", "pieces status headers framing end")
Request = collections.namedtuple("Request", "line headers json prompt")
JSON, HTML = {"Content-Type": "application/json"}, {"Content-Type": "text/html"}
# What comes for ever: nothing, whole lines, or one more byte of a line
FOREVER = {"stall": b"", "pings": b"8\r\n: ping\n\n\r\n", "drip": b"1\r\n0\r\n"}


def answer(*pieces, status=200, headers=(), framing="length", end="clean"):
    """What the server sends.

    pieces   of the body; an object is sent as JSON
    framing  length, chunked (each piece is one chunk) or close
    end      clean, short (the framing promises more), reset (once the test allows it,
             because a reset discards what was not read), or one of FOREVER
    """
    raw = [p.encode() if isinstance(p, str) else p for p in pieces]
    if not all(isinstance(piece, bytes) for piece in raw):
        raw = [json.dumps(piece).encode() for piece in raw]
        headers = {**JSON, **dict(headers)}
    return Answer(raw, status, dict(headers), framing, end)


def sse(*events, done=True, framing="chunked", end="clean"):
    """A stream with these objects (or texts) as the data of its events."""
    texts = [e if isinstance(e, str) else json.dumps(e) for e in events]
    pieces = [f"data: {text}\n\n" for text in texts + ["[DONE]"] * done]
    headers = {"Content-Type": "text/event-stream"}
    return answer(*pieces, headers=headers, framing=framing, end=end)


HEAD = {"id": "c1", "object": "chat.completion", "created": 7, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
USAGE["estimated_cost"] = 0.25


def delta(content=None, finish=None, index=0, **fields):
    """A chunk; fields are of its delta."""
    part = {} if content is None else {"role": "assistant", "content": content}
    choice = {"index": index, "delta": {**part, **fields}, "finish_reason": finish}
    return {**HEAD, "object": "chat.completion.chunk", "choices": [choice]}


def completion(content="ok", finish="stop", usage=USAGE):
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {**HEAD, "choices": [choice], "usage": usage}


def echo(request):
    """Answer with the last message, at a cost of 0.25, as asked: streamed or whole."""
    if request.json.get("stream"):
        return sse(delta(request.prompt), {**END, "usage": USAGE})
    return answer(completion(request.prompt))


class Server:
    """Answers on 127.0.0.1 with `answers`: one a request, the last for all that follow.

    An answer may be a function of the Request; None closes the connection at once.
    """

    def __init__(self, *answers, tls=None):
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self._tls, self._lock = tls, threading.Lock()
        self.requests, self.arrived = [], threading.Semaphore(0)
        self.is_over, self.may_reset = threading.Event(), threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._socket.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self.is_over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def client(self, **settings):
        defaults = {"token": TOKEN, "base_url": self.url, "timeout": PATIENCE}
        client = nemotron.Client(**{**defaults, **settings})
        client.slept = []
        client._sleep = lambda seconds: seconds and client.slept.append(seconds)
        return client

    def sent(self):
        """The prompts that came, sorted and joined."""
        return "".join(sorted(request.prompt for request in self.requests))

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                args = self._socket.accept()[:1]
                threading.Thread(target=self._serve, args=args, daemon=True).start()

    def _serve(self, connection):
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError, ValueError))
            stack.enter_context(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
                stack.enter_context(connection)
            request = self._read(stack.enter_context(connection.makefile("rb")))
            with self._lock:
                self.requests.append(request)
                reply = next(self._answers)
            self.arrived.release()
            reply = reply(request) if callable(reply) else reply
            if isinstance(reply, Answer):
                self._send(connection, reply)

    def _read(self, file):
        """Return the Request.  Raises ValueError if the client has gone."""
        line = file.readline().decode().strip()
        headers = http.client.parse_headers(file)
        body = json.loads(file.read(int(headers.get("Content-Length", 0))) or "{}")
        prompt = body["messages"][-1]["content"] if body else ""
        return Request(line, headers, body, prompt)

    def _send(self, connection, reply):
        headers, is_chunked = dict(reply.headers), reply.framing == "chunked"
        if reply.framing == "length":
            size = sum(map(len, reply.pieces))
            headers["Content-Length"] = size + (10 if reply.end != "clean" else 0)
        elif is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {reply.status} Reason\r\n{head}\r\n"
        connection.sendall(head.encode("latin-1"))
        for piece in reply.pieces:
            chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
            connection.sendall(chunk if is_chunked else piece)
        if is_chunked and reply.end == "clean":
            connection.sendall(b"0\r\n\r\n")
        while reply.end in FOREVER and not self.is_over.wait(0.05):
            connection.sendall(FOREVER[reply.end])
        if reply.end == "reset" and self.may_reset.wait(PATIENCE):
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


# --------------------------------------------------------------------------- Helpers


def each(**cases):
    """Run a test with the values of each case: a tuple, or a single one."""

    def decorate(test):
        @functools.wraps(test)
        def run(self):
            for name, values in cases.items():
                with self.subTest(name):
                    values = values if type(values) is tuple else (values,)
                    test(self, *values)

        return run

    return decorate


def packed(text):
    """Return the cases of a text, separated by "|" and named by themselves."""
    return {case: case for case in map(str.strip, text.split("|"))}


def environment(**extra):
    keep = ("PATH", "HOME", "SYSTEMROOT", "TMPDIR")
    return {**{name: os.environ[name] for name in keep if name in os.environ}, **extra}


def run(args, stdin=b"", cwd=None, **env):
    """Run a program, or a line of bash; return its status, output and errors."""
    args = ["bash", "-c", args] if isinstance(args, str) else list(map(str, args))
    kwargs = {"input": stdin, "cwd": cwd, "env": environment(**env)}
    done = subprocess.run(args, capture_output=True, timeout=PATIENCE, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def main(*args, stdin=b""):
    """Call main() with standard streams of its own; return what run() would."""
    kwargs = {"newline": "\n", "write_through": True}
    out, err = (io.TextIOWrapper(io.BytesIO(), **kwargs) for _ in range(2))
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it would be written to err
        file.write(stdin)
        file.seek(0)
        streams = {"stdin": io.TextIOWrapper(file), "stdout": out, "stderr": err}
        with streams["stdin"], mock.patch.multiple(sys, **streams):
            status = nemotron.main(list(map(str, args)))
    return status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.rows, self.file = self.folder / "rows.jsonl", self.folder / "chat.json"
        self.addCleanup(shutil.rmtree, self.folder)
        odd = re.compile("(?i)DEEPINFRA_|NEMOTRON_|.*_proxy$")
        clean = {k: v for k, v in os.environ.items() if not odd.match(k)}
        self.replace(mock.patch.dict(os.environ, clean, clear=True))
        self.warnings, handler = [], logging.Handler()
        handler.emit = lambda record: self.warnings.append(record.getMessage())
        logger = logging.getLogger("nemotron")
        self.replace(mock.patch.multiple(logger, handlers=[handler], propagate=False))

    def replace(self, patch):
        patch.start()
        self.addCleanup(patch.stop)

    def serve(self, *answers, tls=None):
        server = Server(*answers, tls=tls)
        self.addCleanup(server.close)
        return server

    def popen(self, args, **kwargs):
        """Start a program, which is killed if it still runs after the test."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        kwargs = {"env": environment(), **pipes, **kwargs}
        process = subprocess.Popen(list(map(str, args)), **kwargs)
        self.addCleanup(process.__exit__, None, None, None)  # it closes the files
        self.addCleanup(process.kill)
        return process

    def interrupt(self, process):
        """Press Ctrl-C until the process ends: one before a blocking call is lost."""
        for _ in range(PATIENCE):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=1)
                return process.returncode, out.decode(), err.decode()
        raise AssertionError("Ctrl-C did not end the program")

    def error(self, kind, call, *args, says="", **kwargs):
        """Return the error, of just this kind, that the call raises."""
        with self.assertRaises(kind) as caught:
            call(*args, **kwargs)
        self.assertIs(type(caught.exception), kind)
        self.assertRegex(str(caught.exception), r"\A.{1,289}\Z")
        self.assertIn(says, str(caught.exception))
        return caught.exception

    def invalid(self, call, *args, **kwargs):
        """Return the message of the InvalidRequestError that the call raises."""
        return str(self.error(nemotron.InvalidRequestError, call, *args, **kwargs))


# ------------------------------------------------------------- Parameters and requests

# name: (accepted, refused), from the provider's page and OpenAPI file.
BOUNDS = {
    "temperature": ([0, 2, 0.7], [-0.001, 2.001, True, "1", float("nan"), 10**400]),
    "top_p": ([0.001, 1], [0, 1.001, -1]),
    "min_p": ([0, 1], [-0.001, 1.001]),
    "top_k": ([0, 999], [-1, 1000, 1.0, True]),
    "max_tokens": ([0, 1000000], [-1, 1000001, 10.0]),
    "presence_penalty": ([-2, 2], [-2.001, 2.001, float("inf")]),
    "frequency_penalty": ([-2, 2], [-2.001, 2.001]),
    "repetition_penalty": ([0.01, 5], [0.0099, 5.001]),
    "seed": ([0, 2**63 - 1], [-1, 9223372036854776000, 1.0]),
    "tool_choice": (["none", "auto"], ["required", "", {}, []]),
    "user": (["", "me"], [1, ["me"]]),
    "stop": (["x", ["x"], ["x"] * 16], [[], ["x"] * 17, [1], 1]),
    "n": ([1, 4], [0, 5, 1.0]),
    "tools": ([[], [{"type": "function"}]], [{}, ["f"]]),
    "response_format": ([{"type": "json_object"}], ["json", []]),
}
TYPES = {
    "a number": "float | None",
    "an integer": "int | None",
    "a list of objects": "list[JSON] | None",
    "an object": "JSON | None",
    "1 to 16 strings": "str | list[str] | None",
}
USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "42", "tool_call_id": "1"}
BODY = {"model": nemotron.MODEL, "messages": [USER]}
GOOD_MESSAGES = {
    "system in the middle": [USER, SYSTEM, ASSISTANT, USER],
    "a tool's answer": [USER, CALLS, TOOL],
    "no content but calls": [USER, {"role": "assistant", "tool_calls": [CALL]}, TOOL],
    "content in parts": [{**USER, "content": [{"type": "text", "text": "u"}]}],
    "half a surrogate pair": [{"role": "user", "content": "\ud83d"}],
}
BAD_MESSAGES = {  # name: (messages, words of the error)
    "none": ([], "messages"),
    "assistant last but system": ([USER, ASSISTANT, SYSTEM], "messages[1]"),
    "two systems": ([SYSTEM, USER, SYSTEM], "messages[2]"),
    "unknown role": ([{"role": "robot", "content": "x"}], "messages[0]: role"),
    "no content": ([{"role": "user"}], "messages[0]: content"),
    "a tool without id": ([USER, CALLS, {**TOOL, "tool_call_id": None}], "messages[2]"),
}


class RequestTests(Case):
    def test_bounds_of_the_parameters(self):
        self.assertEqual(set(BOUNDS), {row[0] for row in nemotron.PARAMETERS})
        for name, (accepted, refused) in BOUNDS.items():
            for value in accepted:
                with self.subTest(name, accepted=value):
                    body = nemotron.build_request("u", **{name: value})
                    self.assertEqual(body, {**BODY, name: value})
            for value in refused:
                with self.subTest(name, refused=str(value)[:30]):
                    message = self.invalid(nemotron.build_request, "x", **{name: value})
                    self.assertIn(name, message)

    def test_unknown_names_and_settings_of_the_client(self):
        build, client = nemotron.build_request, nemotron.Client(token="x")
        message = self.invalid(build, "x", temprature=1)
        self.assertIn("temperature", message.split("temprature", 1)[1])
        for call in (build, client.chat, client.batch):
            for name in ("timeout", "deadline", "retries", "token", "base_url"):
                self.assertIn("Client(", self.invalid(call, "x", **{name: 5}))

    def test_system_stream_extra_and_none(self):
        build = nemotron.build_request
        nothing = dict.fromkeys([*BOUNDS, "system", "extra", "model"])
        self.assertEqual(build("u", **nothing), BODY)
        body = {**BODY, "messages": [SYSTEM, USER], "stream": True}
        self.assertEqual(build("u", system="s", stream=True), body)
        self.invalid(build, [SYSTEM, USER], system="s")
        self.invalid(build, "u", system=5)
        extra = {"logprobs": True, "temperature": 9}  # which is not validated
        self.assertEqual(build("u", temperature=1, extra=extra), {**BODY, **extra})
        for bad in ({"messages": []}, {"model": "x"}, {"stream": True}, [1]):
            self.invalid(build, "x", extra=bad)

    def test_what_cannot_be_sent_or_shown(self):
        server, loop, deep = self.serve(echo), [], []
        loop.append(loop)
        for _ in range(100000):
            deep = [deep]
        for value in (float("nan"), {1, 2}, loop, deep):
            self.invalid(server.client().chat, "x", extra={"y": value})
        self.invalid(server.client().chat, "x", stream=True)
        self.invalid(server.client().stream, "x", n=2)
        self.assertEqual(server.requests, [])

    @each(**GOOD_MESSAGES)
    def test_good_messages(self, messages):
        before = json.dumps(messages)
        body = nemotron.build_request(messages)
        self.assertEqual(body["messages"], messages)
        body["messages"][0]["content"] = "changed"
        self.assertEqual(json.dumps(messages), before)

    @each(**BAD_MESSAGES)
    def test_bad_messages(self, messages, words):
        self.assertIn(words, self.invalid(nemotron.build_request, messages))

    def test_params_are_typed_as_in_the_table(self):
        code = (HERE / "nemotron.py").read_text(encoding="utf-8")
        params = code.partition("class Params(")[2].partition("\n\n")[0]
        typed = dict(re.findall(r"^ +(\w+): (.+)$", params, re.M))
        table = {row[0]: TYPES.get(row[1], "str | None") for row in nemotron.PARAMETERS}
        others = {"model": "str | None", "system": "str | None", "extra": "JSON | None"}
        self.assertEqual(typed, {**table, **others})


# ------------------------------------------------------------------ Replies and events

EVENTS = {  # name: (body, data of its events)
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    "BOM, no space": (b"\xef\xbb\xbfdata:a\n\ndata:b\n\n", ["a", "b"]),
    "several lines": (b'data: ["a",\ndata: 1]\n\n', ['["a",\n1]']),
    "other fields": (b"id: 1\nretry: 5\nwhat\ndatab: x\ndata: a\n\n", ["a"]),
    "no empty line": (b"data: a\n\ndata: [1]\n", ["a", "[1]"]),
    "torn at the end": (b"data: a\n\ndata: [1", ["a"]),
    "UTF-8": ("data: é\U0001f600\u2028\x85b\n\n".encode(), ["é\U0001f600\u2028\x85b"]),
}
ERRORS = packed(
    """InvalidRequestError: NemotronError ValueError | ReplyError: NemotronError
    | APIConnectionError: NemotronError | IncompleteReplyError: ReplyError
    | APITimeoutError: APIConnectionError TimeoutError | APIStatusError: NemotronError
    | AuthenticationError: APIStatusError | RateLimitError: APIStatusError"""
)


def single_bytes(raw):
    return [raw[i : i + 1] for i in range(len(raw))]


class ReplyTests(Case):
    @each(**EVENTS)
    def test_events_cut_anywhere(self, raw, expected):
        cuts = [[raw], single_bytes(raw)]
        cuts += [[raw[:i], raw[i:]] for i in range(1, len(raw))]
        for pieces in cuts:
            events = nemotron.split_events(nemotron.split_lines(iter(pieces)))
            self.assertEqual([data for _, data in events], expected)

    def test_properties_are_those_of_choice_0(self):
        choices = completion("b", "length")["choices"] + completion("a")["choices"]
        choices[0]["index"] = 1
        reply = nemotron.Completion(choices=choices)
        self.assertEqual((reply.text, reply.finish_reason), ("a", "stop"))
        self.assertEqual(nemotron.Chunk(delta("b", index=1)).text, "")
        reply = nemotron.Completion(choices=[{"message": {**CALLS, "refusal": None}}])
        body = nemotron.build_request([USER, reply.message, TOOL])
        self.assertEqual(body["messages"][1]["tool_calls"], [CALL])

    @each(
        estimated=({"estimated_cost": 0.5, "cost": 1}, 0.5),
        nothing=({"estimated_cost": 0, "cost": 1}, 0),
        the_other_field=({"estimated_cost": None, "cost": 0.5}, 0.5),
        not_a_number=({"cost": float("nan")}, None),
        too_large=({"estimated_cost": 10**400}, None),
    )
    def test_cost(self, usage, expected):
        self.assertEqual(nemotron.Completion(usage=usage).cost, expected)

    @each(**ERRORS)
    def test_the_tree_of_errors(self, line):
        kind = getattr(nemotron, line.partition(":")[0])
        bases = " ".join(base.__name__ for base in kind.__bases__)
        self.assertEqual(f"{kind.__name__}: {bases}", line)
        text = str(kind("a\nb\x1b[31m\u202e" + "c" * 900))
        self.assertRegex(text, r"\Aa b\\x1b\[31m\\u202ec{200,260}\.\.\.\Z")


# --------------------------------------------------------------------------- Streaming

ODD = packed(
    """null | 5 | "x" | {"0": {}} | [null] | [[]] | [{}] | [{"message": []}]
    | [{"index": 0, "message": null, "delta": null}] | [{"index": [], "delta": {}}]
    | [{"message": {"content": 5, "tool_calls": [5]}, "finish_reason": 5}]
    | [{"index": 0, "delta": {"content": {}, "tool_calls": [5]}}]"""
)
END = delta(finish="stop")
TWICE = {"choices": [delta(text)["choices"][0] for text in "ab"]}
NULLS = {"choices": [{"index": 0, "delta": None, "finish_reason": ""}]}
OTHERS = [delta("x", index=1), delta("a"), END, delta(finish="stop", index=1)]
ZIPPED = answer(b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
AFTER_END = {"choices": [], "usage": USAGE}
DEEP = delta("a", items=["here"])
DEEP = json.dumps(DEEP).replace('"here"', '{"a":' * 200 + "1" + "}" * 200)
NUMBER = {**delta(), "usage": {"reasoning": 5}}
STREAMS = {  # name: (data of the events, the pieces of text); each is a whole reply
    "no finish_reason but [DONE]": ([delta("a")], ["a"]),
    "stop token": ([delta("a"), delta("</s>"), END], ["a"]),
    "stop token, empty text": ([delta("</s>"), delta(""), END], []),
    "stop token is text": ([delta("</s>"), delta("b", "stop")], ["</s>b"]),
    "keep-alives": (["", "null", ": ping", ":", delta("a"), END], ["a"]),
    "nulls": ([{}, {"choices": None}, NULLS, delta("a"), END], ["a"]),
    "two entries of one index": ([TWICE, END], ["ab"]),
    "text after the end": ([delta("a", "stop"), delta("b")], ["a"]),
    "error after the end": ([delta("a", "stop"), {"error": "late"}], ["a"]),
    "other choices": (OTHERS, ["a"]),
    "a deep item without an index": ([DEEP, END], ["a"]),
    "running text that is a number": ([delta("a", refusal=False), NUMBER, END], ["a"]),
}
FAILURES = packed(  # after a chunk "a"
    """{"error": {"message": "Boom"}} | {"message": "Boom"} | {Boom | "Boom"
    | {"choices": null, "error_message": "Boom"} | {"detail": {"error": "Boom"}}
    | {"choices": [{"index": 0, "finish_reason": "stop", "error": {"message": "Boom"}}]}
    | {"choices": [{"index": 0, "delta": {"content": "b"}}], "error": "Boom"}
    | {"choices": [{"index": 0, "delta": {"content": []}, "finish_reason": "Boom"}]}
    | {"choices": [{"index": "0", "delta": {"content": "Boom"}}]}"""
)
NO_REPLIES = packed(  # "_" is a line end
    """event: error_data: Boom__ | event: error_data: Boom | data: [DONE]__
    | event: error_data: {"message": "Boom"}__ | event: error_data:__"""
)
# To read a stream to its end
WAYS = (list, lambda stream: list(stream.chunks()), nemotron.Stream.completion)


class StreamTests(Case):
    def stream(self, *args, **kwargs):
        return self.serve(sse(*args, **kwargs)).client().stream("x")

    def test_the_documented_examples(self):
        chunks = [delta(text) for text in (" ", " Hi", "!", "", "</s>")] + [END]
        whole = completion(" Hello!")
        server = self.serve(answer(whole), sse(*chunks))
        client = server.client()
        reply = client.chat("u")
        (request,) = server.requests
        self.assertEqual(request.line, "POST /v1/chat/completions HTTP/1.1")
        self.assertEqual(request.headers["content-type"], "application/json")
        self.assertEqual(request.headers["authorization"], f"Bearer {TOKEN}")
        self.assertEqual((request.json, reply), (BODY, whole))
        self.assertEqual(reply.message, reply["choices"][0]["message"])
        found = (reply.text, reply.finish_reason, reply.usage, reply.cost)
        self.assertEqual(found, (" Hello!", "stop", USAGE, 0.25))
        self.assertEqual(list(client.stream("u")), [" ", " Hi", "!"])
        self.assertEqual(server.requests[1].json, {**BODY, "stream": True})
        self.assertEqual(list(client.stream("u").chunks()), chunks)

    @each(**STREAMS)
    def test_whole_replies(self, events, texts):
        raw = b"".join(sse(*events).pieces)
        for pieces in ([raw], single_bytes(raw)):
            client = self.serve(answer(*pieces, framing="chunked")).client()
            stream = client.stream("x")
            self.assertEqual(list(stream), texts)
            whole = stream.completion()
            self.assertEqual(whole.text, "".join(texts))
            self.assertEqual(whole, client.stream("x").completion())

    @each(
        twice=[{**delta("a"), "usage": {"prompt_tokens": 1}}, END, AFTER_END],
        null_at_the_end=[{**delta(), "usage": USAGE}, {**END, "usage": None}],
        after_a_late_error=[delta("a"), END, {"error": "late"}, AFTER_END],
    )
    def test_usage_counts_wherever_it_comes(self, events):
        self.assertEqual(self.stream(*events).completion().usage, USAGE)

    def test_chat_equals_stream(self):
        calls = completion(None, "tool_calls")
        calls["choices"][0]["message"]["tool_calls"] = [{**CALL, "id": i} for i in "12"]
        begin = {"type": "function", "function": {"name": "f", "arguments": "{"}}
        rest = {"function": {"arguments": "}"}}
        pieces = [
            delta(tool_calls=[{"index": 0, "id": "1", **begin}]),
            delta(tool_calls=[{"index": 1, "id": "2", **begin}, {"index": 0, **rest}]),
            delta(tool_calls=[{"index": 1, **rest, "id": "", "type": None}]),
        ]
        text = (completion("abc"), [delta("a"), delta("bc")])
        for reply, chunks in (text, (calls, pieces)):
            last = delta(finish=reply["choices"][0]["finish_reason"])
            stream = sse(*chunks, {**last, "usage": USAGE})
            pretty = answer("\ufeff\n" + json.dumps(reply, indent=2), headers=JSON)
            client = self.serve(answer(reply), stream, answer(reply), pretty).client()
            self.assertEqual(client.chat("x"), reply)
            for _ in range(3):  # events, JSON in place of events, and more JSON
                self.assertEqual(client.stream("x").completion(), reply)

    def test_completion_keeps_what_the_server_sent(self):
        first = delta("", reasoning_content="th", refusal=None, mood="calm")
        second = delta("a", reasoning_content="ink", refusal="no", mood="", x=[1])
        first["choices"][0]["logprobs"] = {"content": [{"token": "a"}]}
        second["choices"][0]["logprobs"] = {"content": [{"token": "b"}], "y": []}
        expected = completion("a")
        extra = {"reasoning_content": "think", "refusal": "no", "mood": "calm"}
        expected["choices"][0]["message"].update(extra, x=[1])
        logprobs = {"content": [{"token": "a"}, {"token": "b"}], "y": []}
        expected["choices"][0]["logprobs"] = logprobs
        stream = self.stream(first, {**second, "tier": "x"}, END, AFTER_END)
        self.assertEqual(stream.completion(), {**expected, "tier": "x"})

    @each(
        a_clean_end=("clean", "chunked"),
        closed=("clean", "close"),
        too_short=("short", "length"),
        cut_between_chunks=("short", "chunked"),
        reset=("reset", "chunked"),
        silence=("stall", "chunked"),
    )
    def test_ways_to_stop_early(self, end, framing):
        reply = sse(delta("a"), delta("b"), done=False, framing=framing, end=end)
        for read in WAYS[:1] if end == "stall" else WAYS:
            server = self.serve(reply)
            stream = server.client(timeout=0.3 if end == "stall" else 60).stream("x")
            if end == "reset":
                texts = iter(stream)
                self.assertEqual([next(texts), next(texts)], ["a", "b"])
                server.may_reset.set()
            for _ in range(2):  # the second time it raises the same
                error = self.error(nemotron.IncompleteReplyError, read, stream)
            self.assertEqual((error.partial.text, error.exit_status), ("ab", 3))
            self.assertIsInstance(error.__cause__, Exception)
            self.assertEqual(len(server.requests), 1)  # it is not retried

    @each(**packed("clean | short | reset | stall | pings"))
    def test_nothing_after_the_end_spoils_it(self, end):
        server = self.serve(sse(delta("a"), END, done=False, end=end))
        self.assertEqual(nemotron.GRACE, 5)
        with mock.patch.object(nemotron, "GRACE", 0.05):
            stream = server.client().stream("x")
            chunks = stream.chunks()
            self.assertEqual([next(chunks), next(chunks)], [delta("a"), END])
            server.may_reset.set()
            self.assertEqual(stream.completion().text, "a")

    @each(**FAILURES, deep='{"Boom":' * 990 + "1" + "}" * 990)
    def test_failures_inside_a_200(self, event):
        for read in WAYS:
            stream = self.stream(delta("a"), event, END)
            error = self.error(nemotron.ReplyError, read, stream, says="Boom")
            self.assertEqual(error.partial.text, "a")

    @each(**NO_REPLIES)
    def test_events_that_are_no_reply(self, body):
        stream = self.serve(answer(body.replace("_", "\n"))).client().stream("x")
        error = self.error(nemotron.ReplyError, stream.completion)
        self.assertEqual("Boom" in str(error), "Boom" in body)

    @each(**ODD)
    def test_odd_json_raises_nothing_else(self, text):
        reply = nemotron.Completion(choices=json.loads(text), usage=json.loads(text))
        for one in (reply, nemotron.Chunk(reply)):
            self.assertEqual((one.text, one.finish_reason), ("", None))
            self.assertIsInstance(one.usage, dict)
        self.assertEqual((reply.tool_calls, reply.cost), ([], None))
        self.assertEqual(reply.message, {"role": "assistant", "content": ""})
        try:
            reply = self.stream(json.dumps(reply)).completion()
        except nemotron.ReplyError as error:
            reply = error.partial
        self.assertEqual(reply.text, "")

    @each(line=b"x" * 1000, data=b"data: xxx\n" * 1000, others=b"id: x\n" * 1000)
    def test_an_endless_body_is_an_error(self, piece):
        client = self.serve(answer(*[piece] * 200, framing="chunked")).client()
        with mock.patch.object(nemotron, "MAX_BYTES", 100000):
            self.error(nemotron.ReplyError, list, client.stream("x"), says="over")
            self.error(nemotron.ReplyError, client.chat, "x", says="over")

    def test_each_piece_comes_at_once_and_a_stream_can_be_closed(self):
        with self.stream(delta("a"), delta("b"), done=False, end="stall") as stream:
            self.assertEqual(next(stream), "a")  # while the server is silent
            self.assertEqual(next(stream.chunks()).text, "b")
        error = self.error(nemotron.IncompleteReplyError, stream.completion)
        self.assertEqual(error.partial.text, "ab")
        with self.stream(delta("a"), END, done=False, end="stall") as stream:
            chunks = stream.chunks()
            self.assertEqual([next(chunks), next(chunks)], [delta("a"), END])
        self.assertEqual(stream.completion().text, "a")


# ----------------------------------------------------------------- Faults and retries

ERROR_BODIES = packed(  # as seen in the wild
    """{"error": {"message": "Boom", "code": 404}} | {"detail": {"error": "Boom"}}
    | {"title": "Gone", "detail": "Boom"} | {"detail": [{"loc": [5], "msg": "Boom"}]}
    | Boom | <title>x</title> | [1, {"error": null}] | {"error": {}} | | 5"""
)
RETRIED = (408, 409, 429, 500, 502, 503, 504)
REDIRECTS = (301, 302, 303, 307, 308)
REFUSED, BUSY = nemotron.AuthenticationError, nemotron.RateLimitError
KINDS = {401: REFUSED, 402: REFUSED, 403: REFUSED, 429: BUSY, 503: BUSY}
NOT_ANSWERS = packed(
    """<title>Login</title> | ok | [] | {} | {"choices": []} | {"choices": null}
    | {"error": {"message": "Boom"}} | {"choices": [{"error": "x", "message": {}}]}
    | {"choices": [{"""
)
ODD_TEXTS = {
    "a deep list": "[" * 100000,
    "deep objects": '{"error":' * 900 + "1" + "}" * 900,
    "a long number": "1" * 6000,
}


class FaultTests(Case):
    @each(**ERROR_BODIES, **ODD_TEXTS, not_utf_8=b"\xff Boom", long="Boom " * 500)
    def test_error_bodies(self, body):
        client = self.serve(answer(body, status=400)).client()
        error = self.error(nemotron.APIStatusError, client.chat, "x", says="400")
        self.assertEqual("Boom" in str(error), "Boom" in str(body))

    def test_statuses(self):
        other = self.serve(echo)
        headers = {"x-request-id": "r1", "Retry-After": "121", "Location": other.url}
        for status in (*KINDS, *RETRIED, *REDIRECTS, 400, 404, 410, 422, 501):
            server = self.serve(answer({"error": "x"}, status=status, headers=headers))
            client = server.client()
            says = "redirect" if status in REDIRECTS else str(status)
            for call in (client.chat, client.stream):
                kind = KINDS.get(status, nemotron.APIStatusError)
                with self.subTest(status):
                    error = self.error(kind, call, "x", says=says)
                    found = (error.status_code, error.request_id, error.retry_after)
                    self.assertEqual(found, (status, "r1", 121))
                    self.assertEqual(error.body, {"error": "x"})
                    self.assertEqual(error.retryable, status in RETRIED)
            self.assertEqual((len(server.requests), client.slept), (2, []))
        self.assertEqual(other.requests, [])

    @each(bad=(400, "maximum context length is 4096"), broken=(500, "input length"))
    def test_an_overrun_of_the_context_is_not_retried(self, status, words):
        server = self.serve(answer({"error": f"{words} exceeded"}, status=status))
        error = self.error(nemotron.APIStatusError, server.client().chat, "x")
        self.assertRegex(str(error), "4,096 tokens.*shorten")
        self.assertEqual(len(server.requests), 1)

    @each(**{str(status): (status,) for status in (*RETRIED, None)})
    def test_what_may_pass_is_retried(self, status):
        bad = status and answer("The upstream took too long", status=status)
        server = self.serve(bad, bad, echo, bad, bad, echo)
        client = server.client()
        self.assertEqual(client.chat("ok").text, "ok")
        self.assertEqual(client.stream("ok").completion().text, "ok")
        self.assertEqual((len(server.requests), len(client.slept)), (6, 4))

    def test_retries_come_to_an_end(self):
        server = self.serve(answer("busy", status=503))
        client = server.client(retries=7)
        self.error(nemotron.RateLimitError, client.chat, "x")
        self.assertEqual((len(server.requests), len(self.warnings)), (8, 7))
        for delay, most in zip(client.slept, (0.5, 1, 2, 4, 8, 8, 8)):
            self.assertTrue(0.75 * most <= delay <= most, client.slept)

    @each(
        seconds=("7", 7, 7),
        the_most=("120", 120, 120),
        a_date=(email.utils.formatdate(time.time() + 110, usegmt=True), 1, 110),
        below_0=("-5", 0, 0.5),
        NaN=("nan", 0.375, 0.5),
    )
    def test_retry_after(self, value, low, high):
        busy = answer("busy", status=429, headers={"Retry-After": value})
        client = self.serve(busy, echo).client()
        self.assertEqual(client.chat("ok").text, "ok")
        (delay,) = client.slept or [0]
        self.assertTrue(low <= delay <= high, delay)

    @each(infinite="inf", past_the_deadline="100")
    def test_too_long_a_wait_is_not_made(self, value):
        server = self.serve(answer("", status=503, headers={"Retry-After": value}))
        client = server.client(deadline=90)
        self.error(nemotron.RateLimitError, client.chat, "x")
        self.assertEqual((client.slept, len(server.requests)), ([], 1))

    @each(
        too_short=answer("{", end="short"),
        cut_between_chunks=answer("{", framing="chunked", end="short"),
        reset=answer("{", end="reset"),
        empty=answer(framing="chunked"),
    )
    def test_a_blocking_call_is_retried_until_its_body_is_read(self, reply):
        server = self.serve(reply, reply, echo)
        server.may_reset.set()
        self.assertEqual(server.client().chat("ok").text, "ok")

    @each(**NOT_ANSWERS, **ODD_TEXTS)
    def test_200_but_not_an_answer(self, body):
        server = self.serve(answer(body, headers=HTML if "<" in body else JSON))
        client = server.client()
        for call in (client.chat, lambda prompt: client.stream(prompt).completion()):
            error = self.error(nemotron.ReplyError, call, "x")
            found = (error.status_code, "Boom" in str(error))
            self.assertEqual(found, (200, "Boom" in body))
        self.assertEqual(len(server.requests), 2)

    @each(timeout={"timeout": 0.03}, deadline={"deadline": 0.03})
    def test_a_mute_server_is_a_timeout(self, settings):
        server = self.serve(lambda request: server.is_over.wait(PATIENCE))
        client = server.client(retries=0, **settings)
        for call in (client.chat, client.stream):
            self.error(nemotron.APITimeoutError, call, "x")

    def test_a_refused_connection_is_retried_and_shows_the_port(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            client = self.serve(echo).client(base_url=f"http://{address}")
        error = self.error(nemotron.APIConnectionError, client.chat, "x", says=address)
        self.assertIsInstance(error.__cause__, OSError)
        self.assertEqual(len(client.slept), 2)

    @each(unknown=(socket.EAI_NONAME, 0), for_now=(socket.EAI_AGAIN, 2))
    def test_hosts_that_are_not_found(self, code, retries):
        client, problem = self.serve(echo).client(), socket.gaierror(code, "not known")
        with mock.patch.object(socket, "getaddrinfo", side_effect=problem):
            self.error(nemotron.APIConnectionError, client.chat, "x")
        self.assertEqual(len(client.slept), retries)

    def test_the_deadline_ends_a_body_that_drips(self):
        blocking = answer(framing="chunked", end="drip")
        streamed = sse(delta("a"), done=False, end="drip")
        server = self.serve(lambda r: streamed if r.json.get("stream") else blocking)
        client = server.client(deadline=0.5, retries=0)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            call, stream = pool.submit(client.chat, "x"), client.stream("x")
            error = self.error(nemotron.IncompleteReplyError, stream.completion)
            self.error(nemotron.APITimeoutError, call.result)
        self.assertEqual(error.partial.text, "a")


# ------------------------------------------------------------------ Settings and token

BAD_URLS = """api.example.com ftp://x/v1 file:///etc/passwd https:// https://x\\y/
    https://user:secret@x/ https://x/?a=b https://x/#a https://x:port/ https://x:65536/
    https://x:0/ http://example.com/v1 http://0.0.0.0/ http://[::2]/ http://127.0.0.999
    http://127.0.0.1.example.com http://127.1 http://127.0.0.01 http://2130706433
    http://[::1].evil.com http://localhost@evil.com http://evil.com\\@localhost
    http://127.0.0.1:80@evil.com/ http://localhost。evil.com http://127.0.0.\uff11"""
GOOD_URLS = """https://x https://x/v1/ https://x.example.com:8080/v1 HTTPS://X/v1
    http://localhost:1 http://LOCALHOST http://127.9.9.255 http://[::1]:8/v1"""
BAD_SETTINGS = {
    "timeout": [0, -1, "5", True, float("inf")],
    "deadline": [0, -1, "5"],
    "retries": [-1, 1.5],
    "model": [5],
    "token": [5, b"x"],
    "base_url": [5, "", "https://x\r\n/", "https://a b/", *BAD_URLS.split()],
}
ALL_ESCAPED = "".join(f"\\u{ord(char):04x}" for char in TOKEN)
LEAKS = {
    "body, id": answer({"error": TOKEN}, status=401, headers={"x-request-id": TOKEN}),
    "slashes escaped": answer(json.dumps(TOKEN)[1:-1].replace("/", "\\/"), status=400),
    "JSON, all escaped": answer(f'{{"error": "{ALL_ESCAPED}"}}', status=400),
    "encoding": answer("x", headers={"Content-Encoding": TOKEN}),
    "location": answer("", status=302, headers={"Location": TOKEN}),
    "status line": answer("", status=f"x {TOKEN}"),
    "status": Answer([TOKEN.encode()], TOKEN, {}, "close", "clean"),
    "text, escaped": answer(ALL_ESCAPED, status=400),
    "stream": sse(delta("a"), {"error": TOKEN}),
    "no JSON in a stream": sse(f"{{ {ALL_ESCAPED}"),
}


def shown(error):
    """Yield all that an error shows, and the errors behind it."""
    yield from traceback.format_exception(type(error), error, error.__traceback__)
    while error is not None:
        yield from (str(error), repr(error), repr(error.args))
        yield from (str(getattr(error, name, "")) for name in ("body", "request_id"))
        error = error.__cause__ or error.__context__


class SettingsTests(Case):
    def test_bad_settings_and_good_urls(self):
        for name, values in BAD_SETTINGS.items():
            for value in values:
                with self.subTest(name, value=value):
                    message = self.invalid(nemotron.Client, **{name: value})
                    self.assertNotIn("secret", message)
        for url in GOOD_URLS.split():
            self.assertEqual(nemotron.Client(base_url=url).base_url, url)

    def test_environment(self):
        client, server = nemotron.Client(), self.serve(echo)
        settings = (client.base_url, client.model, client.timeout)
        self.assertEqual(settings, (nemotron.BASE_URL, nemotron.MODEL, 600))
        error = self.error(nemotron.AuthenticationError, client.chat, "x")
        self.assertRegex(str(error), "DEEPINFRA_TOKEN.*--offline")
        self.assertIsNone(error.status_code)
        nemotron.Client(base_url=server.url).chat("x")  # which is this machine
        self.assertNotIn("authorization", server.requests.pop().headers)
        names = ("DEEPINFRA_TOKEN", "DEEPINFRA_API_KEY", "DEEPINFRA_API_TOKEN")
        os.environ.update(zip(names, (" ", "\tkey \n", "other")))
        os.environ.update(DEEPINFRA_BASE_URL=server.url, NEMOTRON_MODEL="of env")
        nemotron.chat("x")
        nemotron.stream("x").completion()
        list(nemotron.batch(["x"]))
        client = nemotron.Client(token="given", model="of client")
        client.chat("x")
        client.chat("x", model="of call")
        sent = [(r.headers["authorization"], r.json["model"]) for r in server.requests]
        given = [("Bearer given", "of client"), ("Bearer given", "of call")]
        self.assertEqual(sent, [("Bearer key", "of env")] * 3 + given)

    @each(CR="a\rcret", CRLF="a\r\ncret", NUL="a\0cret", é="écret")
    def test_bad_tokens_are_neither_sent_nor_shown(self, token):
        server = self.serve(echo)
        client = server.client(token=token)
        for call in (client.chat, client.stream, client.batch):
            error = self.error(nemotron.AuthenticationError, call, "x")
            self.assertNotIn("cret", "".join(shown(error)))
        self.assertEqual(server.requests, [])

    @each(**LEAKS)
    def test_the_token_is_in_no_diagnostic(self, reply):
        client = self.serve(reply).client(retries=1)
        for call in (client.chat, client.stream):
            with self.assertRaises(nemotron.NemotronError) as caught:
                list(call("x"))
            for form in (TOKEN[2:6], ALL_ESCAPED[12:36]):
                self.assertNotIn(form, "".join(shown(caught.exception)))
        rows = []
        with contextlib.suppress(nemotron.AuthenticationError):
            rows.extend(self.serve(reply).client(retries=0).batch(["x"]))
        text = json.dumps(rows) + "".join(self.warnings) + repr(client)
        self.assertNotIn(TOKEN[2:6], text)

    def test_proxies(self):
        proxy, server = self.serve(answer("", status=407)), self.serve(echo)
        address = f"http://127.0.0.1:{proxy.port}"
        os.environ.update(http_proxy=address, https_proxy=address)
        self.assertEqual(server.client().chat("ok").text, "ok")
        self.assertEqual(proxy.requests, [])  # loopback uses none
        if ssl:
            client = server.client(base_url="https://x.invalid/")
            self.error(nemotron.APIConnectionError, client.chat, "x", says="407")
            self.assertIn("CONNECT x.invalid:443 ", proxy.requests[0].line)
            self.assertNotIn("authorization", proxy.requests[0].headers)

    def test_a_python_without_ssl(self):
        code = "import sys; sys.modules['ssl'] = sys.modules['_ssl'] = None; "
        code += "import nemotron; sys.exit(nemotron.main(['-n', *sys.argv[1:]]))"
        command = [sys.executable, "-S", "-c", code]
        status, out, err = run([*command, "x"], cwd=HERE, DEEPINFRA_TOKEN="x")
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, r"\Anemotron: .*\bssl\b.*\n\Z")
        self.assertEqual(run([*command, "--offline", "x"], cwd=HERE), (0, "x\n", ""))

    @unittest.skipUnless(ssl and shutil.which("openssl"), "needs ssl and openssl")
    def test_https(self):
        pem = self.folder / "pem"
        make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        make += " -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -days 2"
        done = run([*make.split(), "-keyout", f"{pem}.key", "-out", pem])
        self.assertEqual(done[0], 0, done[2])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem, f"{pem}.key")
        server = self.serve(echo, sse(delta("a"), done=False), echo, tls=context)
        client = server.client()
        self.error(nemotron.APIConnectionError, client.chat, "x", says="SSL_CERT_FILE")
        self.assertEqual((server.requests, client.slept), ([], []))
        os.environ["SSL_CERT_FILE"] = str(pem)
        client = server.client(deadline=PATIENCE)
        self.assertEqual(client.stream("a").completion().text, "a")
        self.error(nemotron.IncompleteReplyError, client.stream("a").completion)
        rows = list(client.batch("abc", jobs=3))
        self.assertEqual([row["error"] for row in rows], [None] * 3)

    def test_offline(self):
        os.environ.update(DEEPINFRA_TOKEN="x\ny", DEEPINFRA_BASE_URL="nonsense")
        with nemotron.offline() as client:
            for text in ("Hello!", "two  words\n and\n", " ", "", "€ </s> x", "</s>"):
                messages = [SYSTEM, USER, ASSISTANT, {**USER, "content": text}]
                whole = client.chat(messages)
                streamed = client.stream(messages).completion()
                self.assertEqual((whole.text, streamed.text), (text, text))
                self.assertEqual((whole.usage, whole.cost), (streamed.usage, 0))
            self.assertEqual(len(client.chat("x", n=3)["choices"]), 3)


# ------------------------------------------------------------------------------- Batch

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
OWN = [{"role": "system", "content": "own"}, USER]
DEFAULTS = {"system": "s", "seed": 1, "extra": {"a": 1, "b": 1}, "model": "m"}
FORMED = {"model": "m", "messages": [SYSTEM, USER], "seed": 1, "a": 1, "b": 1}
FORMS = {  # name: (request, how its body differs from FORMED)
    "text": ("u", {}),
    "prompt": (
        {"prompt": "u", "custom_id": "x", "seed": 2, "b": 2},
        {"seed": 2, "b": 2},
    ),
    "prompt, system": ({"prompt": "u", "system": "own"}, {"messages": OWN}),
    "body": ({"messages": [USER], "y": True}, {"y": True}),
    "streamed": ({"messages": [USER], "stream": True, "stream_options": {}}, {}),
    "line": ({**LINE, "body": {"messages": [USER], "model": "z"}}, {"model": "z"}),
    "own system": ({"messages": OWN}, {"messages": OWN}),
}
BAD_FORMS = packed(
    """5 | null | [] | {} | {"prompt": "u", "messages": []} | {"prompt": 5}
    | {"prompt": "u", "top_p": 0} | {"custom_id": 5, "prompt": "u"}
    | {"messages": 5} | {"body": []} | {"prompt": "u", "y": NaN}"""
)
NAMED = [{"custom_id": name, "prompt": "x"} for name in "ab"]
ALIKE = [{"custom_id": f"a-line-{i}", "prompt": "x"} for i in "12"]
RESUMED = {  # name: (requests of a first run, of a second, prompts that it sends)
    "one more on top": ("ab", "cab", "c"),
    "edited": ("ab", "aB", "B"),
    "reordered": ("abc", "cba", ""),
    "identical": ("aa", "aaa", "a"),
    "named": (NAMED, NAMED[::-1], ""),
    "renamed": (NAMED[:1], NAMED[1:], "x"),
    "names that end alike": (ALIKE[:1], ALIKE[1:], "x"),
}


class BatchCase(Case):
    def read(self):
        return [json.loads(line) for line in self.rows.read_bytes().splitlines()]

    def send(self, requests, *answers, **params):
        """Run a batch with `rows` as its output; return the prompts that are sent."""
        server = self.serve(*answers or [echo])
        list(server.client().batch(requests, output=str(self.rows), **params))
        return server.sent()

    def batch(self, answers, requests, **settings):
        """Return the rows of a batch with one job, and the server."""
        server = self.serve(*answers)
        return list(server.client(**settings).batch(requests, jobs=1)), server


class BatchTests(BatchCase):
    def test_rows(self):
        replies = {
            "a": answer({"error": "no"}, status=422, headers={"x-request-id": "r"}),
            "b": answer("<title>x</title>"),
            "c": ZIPPED,
            "d": None,
        }
        named = [{"custom_id": n, "prompt": "x"} for n in ("a", "a", None, "line-1")]
        requests = [*"uabcd", 5, *named]
        answers = [lambda request: replies.get(request.prompt, echo(request))]
        rows, _ = self.batch(answers, iter(requests), retries=0)
        names = [*(f"line-{n}" for n in range(1, 7)), "a", "a", "line-9", "line-1"]
        self.assertEqual([row["custom_id"] for row in rows], names)
        codes = [(row["error"] or {"code": None})["code"] for row in rows]
        expected = [None, "api_status", "reply", "reply", "connection"]
        expected += ["invalid_request", None, "duplicate_custom_id", None]
        self.assertEqual(codes, [*expected, "duplicate_custom_id"])
        self.assertEqual(len({row.pop("id") for row in rows}), len(rows))
        response = {"status_code": 200, "request_id": None, "body": completion("u")}
        row = {"custom_id": "line-1", "request": BODY, "response": response}
        self.assertEqual(rows[0], {**row, "error": None})
        response = {"status_code": 422, "request_id": "r", "body": {"error": "no"}}
        self.assertEqual(rows[1]["response"], response)
        statuses = [(row["response"] or {}).get("status_code") for row in rows[2:6]]
        self.assertEqual(statuses, [200, 200, None, None])
        self.assertEqual([row["request"] for row in rows[5:8:2]], [None, None])

    def test_forms_of_requests_and_defaults(self):
        before, forms = json.dumps(FORMS), [form for form, _ in FORMS.values()]
        server = self.serve(echo)
        rows = list(server.client().batch(forms, jobs=1, **DEFAULTS))
        for name, row, request in zip(FORMS, rows, server.requests):
            expected = {**FORMED, **FORMS[name][1]}
            with self.subTest(name):
                self.assertEqual((row["request"], request.json), (expected, expected))
        self.assertEqual(json.dumps(FORMS), before)

    @each(**BAD_FORMS)
    def test_bad_forms_of_requests(self, text):
        (row,), server = self.batch([echo], [json.loads(text)])
        self.assertEqual(row["error"]["code"], "invalid_request")
        self.assertEqual((row["request"], row["response"]), (None, None))
        self.assertEqual(server.requests, [])

    def test_requests_are_taken_lazily(self):
        server, taken = self.serve(echo), []
        source = (taken.append(number) or str(number) for number in itertools.count())
        rows = server.client().batch(source, jobs=5)
        for done in range(1, 40):
            self.assertIsNone(next(rows)["error"])
            self.assertLessEqual(len(taken), done + 5)
        rows.close()
        self.assertLessEqual(len(server.requests), 39 + 5)

    def test_a_source_that_blocks_and_then_fails(self):
        go, rest = threading.Event(), []
        self.addCleanup(go.set)

        def source():
            yield from "ab"
            go.wait(PATIENCE)
            yield "last"
            raise LookupError("the caller's")

        refused = self.serve(answer("no", status=403)).client()
        self.error(nemotron.AuthenticationError, list, refused.batch(source(), jobs=3))
        rows = self.serve(echo).client().batch(source(), jobs=4)
        names = {next(rows)["custom_id"], next(rows)["custom_id"]}
        self.assertEqual((names, go.is_set()), ({"line-1", "line-2"}, False))
        go.set()
        with self.assertRaisesRegex(LookupError, "the caller's"):
            rest.extend(rows)
        self.assertEqual([row["custom_id"] for row in rest], ["line-3"])

    def test_a_refused_token_ends_the_batch_after_the_rows_in_flight(self):
        together, rows = threading.Barrier(4), []

        def reply(request):
            together.wait(PATIENCE)
            return answer("", status=401) if request.prompt == "1" else echo(request)

        server = self.serve(*[reply] * 4, echo)
        batch = server.client().batch(map(str, itertools.count()), jobs=4)
        error = self.error(nemotron.AuthenticationError, rows.extend, batch)
        self.assertEqual((error.status_code, len(rows)), (401, len(server.requests)))
        codes = [row["error"]["code"] for row in rows if row["error"]]
        self.assertEqual(codes, ["authentication"])

    def test_a_busy_server_pauses_all_workers_once(self):
        together = threading.Barrier(4)

        def busy(request):
            together.wait(PATIENCE)
            return answer("", status=503, headers={"Retry-After": "0"})

        server = self.serve(*[busy] * 4, echo)
        with mock.patch.object(nemotron.Batch, "FIRST_PAUSE", 0.01):
            rows = list(server.client(retries=0).batch("abcdefgh", jobs=4))
        self.assertEqual([row["error"] for row in rows], [None] * 8)
        self.assertEqual((len(server.requests), len(self.warnings)), (12, 1))

    def test_a_named_wait_holds_back_the_others(self):
        server = self.serve(answer("", status=429, headers={"Retry-After": "50"}))
        client, paused = server.client(), threading.Event()

        def clock():
            if self.warnings:  # so this is the first look of the pause
                paused.set()
            return time.monotonic()

        def source():
            yield "a"
            paused.wait(PATIENCE)
            yield from ("b", 5)  # the row of 5 needs no server

        client._clock = clock
        rows = client.batch(source(), jobs=3)
        self.assertEqual(next(rows)["custom_id"], "line-3")
        self.assertTrue(server.arrived.acquire(timeout=PATIENCE))
        self.assertFalse(server.arrived.acquire(timeout=0.1))  # "b" is held back
        rows.close()

    def test_rate_limits_use_up_no_retries(self):
        busy = [answer("Rate limited", status=429)] * 5
        with mock.patch.object(nemotron.Batch, "FIRST_PAUSE", 0.001):
            rows, server = self.batch([*busy, echo, *busy, echo], "ab", retries=0)
        self.assertEqual([row["error"] for row in rows], [None, None])
        self.assertEqual((len(server.requests), len(self.warnings)), (12, 10))
        bad = answer("", status=500, headers={"Retry-After": "0"})
        (row,), server = self.batch([bad], "a")  # other failures do
        found = (row["error"]["code"], len(server.requests))
        self.assertEqual(found, ("api_status", 7))

    @each(unnamed=({}, True), too_long=({"Retry-After": "99"}, False))
    def test_a_request_gives_up_after_timeout_seconds_of_pauses(self, headers, waits):
        busy = answer("busy", status=429, headers=headers)
        with mock.patch.object(nemotron.Batch, "FIRST_PAUSE", 0.2):
            (row,), server = self.batch([busy], "a", timeout=0.4)
        self.assertEqual(row["error"]["code"], "rate_limit")
        self.assertEqual(len(server.requests) > 1, waits)

    def test_arguments_are_checked(self):
        client = nemotron.Client(token="x")
        bad = [("jobs", jobs) for jobs in (0, 201, 1.0, True, "8")]
        for name, value in (*bad, ("output", 5), ("top_p", 3), ("tempreature", 1)):
            batch = functools.partial(client.batch, ["a"], **{name: value})
            self.assertIn(name, self.invalid(lambda b=batch: list(b())))
        self.assertEqual(list(client.batch([], jobs=200)), [])

    def test_no_row_is_lost_in_many_small_batches(self):
        client = nemotron.Client(token="x")
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        for _ in range(400):  # of bad requests, which need no network
            self.assertEqual(len(list(client.batch(iter([5, 5]), jobs=2))), 2)

    def test_few_threads(self):
        server, start, few = self.serve(echo), threading.Thread.start, iter(range(2))

        def limited(thread):
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and next(few, None) is None:
                raise RuntimeError("can't start new thread")
            start(thread)

        with mock.patch.object(threading.Thread, "start", limited):
            rows = list(server.client().batch("abcdef", jobs=5))
        self.assertEqual([row["error"] for row in rows], [None] * 6)

    @each(**RESUMED)
    def test_resumed_runs(self, first, second, expected):
        self.send(first)
        before = self.rows.read_bytes()
        self.assertEqual((self.send(second), self.send(second)), (expected, ""))
        self.assertTrue(self.rows.read_bytes().startswith(before))
        self.rows.unlink()

    def test_a_changed_default_or_an_error_sends_again(self):
        for params in ({}, {"seed": 1}, {"model": "z"}, {"system": "s"}):
            self.assertEqual(self.send("a", **params), "a")
        self.assertEqual(self.send("a", seed=1), "")
        self.assertEqual(self.send("b", answer("no", status=400)), "b")
        self.assertEqual((self.send("b"), self.send("b")), ("b", ""))
        deep = json.loads("[" * 99 + "]" * 99)  # deeper than a row shows
        sent = [self.send("d", extra={"deep": deep}) for _ in range(2)]
        self.assertEqual(sent, ["d", ""])

    # What of a row is left after it, or of it if negative; what is sent
    @each(begun=(1, "b"), middle=(90, "b"), no_brace=(-2, "ab"), no_line_end=(-1, "b"))
    def test_torn_last_lines(self, size, expected):
        self.rows.unlink(missing_ok=True)
        self.send("a")
        row = self.rows.read_bytes()
        self.rows.write_bytes(row[:size] if size < 0 else row + row[:size])
        self.assertEqual(self.send("ab"), expected)
        self.assertEqual(len(self.read()), 2)

    def test_what_is_not_a_file_of_rows_is_refused_untouched(self):
        texts = ("hello", "hello\n", '{"prompt": "x"}\n', "\n", '{"id": "x')
        for text in (*texts, '{"id": "batch_req_x", "note": "precious"}'):
            self.rows.write_text(text)
            self.invalid(self.send, "a")
            self.assertEqual(self.rows.read_text(), text)
        self.rows.write_text("")  # of which the input is no other
        args = ("--offline", "--batch", self.rows, "--output", self.rows)
        self.assertEqual(main(*args)[0], 2)
        for path in (self.folder, self.folder / "no" / "x", "/dev/full"):
            self.rows = path
            self.invalid(self.send, "a")

    def test_rows_are_written_before_they_are_read(self):
        rows = self.serve(echo).client().batch("abc", 3, output=str(self.rows))
        next(rows)
        for _ in range(PATIENCE * 100):
            if self.rows.read_bytes().count(b"\n") == 3:
                break
            time.sleep(0.01)
        rows.close()
        self.assertEqual((len(self.read()), self.send("abc")), (3, ""))

    @posix
    def test_two_runs_on_one_file(self):
        rows = self.serve(echo).client().batch("ab", 1, output=str(self.rows))
        next(rows)
        self.invalid(self.send, "c")
        self.assertEqual((len(list(rows)), self.send("abc")), (1, "c"))


@posix
class BatchProgramTests(BatchCase):
    def arguments(self, server, *lines):
        """The arguments for a batch of these lines."""
        path = self.folder / "requests.txt"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
        return ["--batch", path, "--base-url", server.url]

    def main(self, reply, lines, *args):
        """Return the status, the rows, the errors and the server of a batch."""
        server = self.serve(reply)
        status, out, err = main(*self.arguments(server, *lines), "-j", "1", *args)
        return status, list(map(json.loads, out.splitlines())), err, server

    def test_lines(self):
        bad = ('{"prompt"', "[1]", '"\udcff"', '{"prompt": "n", "y": NaN}')
        named = '{"custom_id": "x", "prompt": "own", "seed": 1}\r'
        lines = ("\ufeffplain", '"a string"', "", " ", *bad, named, "last")
        args = ("-s", "s", "-m", "m", "--seed", "5", "-o", "z", "5")
        status, rows, err, _ = self.main(echo, lines, *args)
        self.assertEqual((status, len(rows)), (1, 8))
        self.assertRegex(err, r"\A\w+: .*line-5.*\nnemotron: .*4 invalid_request.*\n\Z")
        sent = {row["custom_id"]: row["request"] for row in rows if not row["error"]}
        turns = {"line-1": "plain", "line-2": "a string", "x": "own", "line-10": "last"}
        defaults = {"model": "m", "seed": 5, "z": 5}
        expected = {
            name: {**defaults, "messages": [SYSTEM, {**USER, "content": text}]}
            for name, text in turns.items()
        }
        expected["x"]["seed"] = 1
        self.assertEqual(sent, expected)

    @each(
        place=("{}, {}.", "a, a.", "b {}, b {}."),
        none=("Do:", "Do:\n\na", "Do:\n\nb {}"),
    )
    def test_templates(self, words, *expected):
        lines = ("a", '"b {}"', '{"prompt": "own"}')
        status, _, _, server = self.main(echo, lines, *words.split(" "))
        self.assertEqual(status, 0)
        self.assertEqual([r.prompt for r in server.requests], [*expected, "own"])

    def test_dry_run_fits_batch(self):
        server, args = self.serve(echo), ("-n", "-o", "stream_options", "{}", "u")
        line = main("--dry-run", *args)[1].encode()
        status, _, _ = main("--batch", "-", "--base-url", server.url, stdin=line)
        self.assertEqual((status, server.requests[0].json), (0, BODY))

    @each(some=({"estimated_cost": 0.25}, 3), none=({}, 1), negative=({"cost": -1}, 1))
    def test_max_cost(self, usage, count):
        reply = answer(completion(usage=usage))
        status, rows, err, server = self.main(reply, "abcdef", "--max-cost", "0.75")
        self.assertEqual((status, len(rows), len(server.requests)), (3, count, count))
        self.assertIn("--max-cost", err)

    def test_20_failures_in_a_row_and_statuses(self):
        no = answer({"error": "no such model"}, status=404)
        lines = ("{bad", "good", *map(str, range(30)))
        args = (lambda r: echo(r) if r.prompt == "good" else no, lines)
        status, rows, err, server = self.main(*args)
        self.assertEqual((status, len(rows), len(server.requests)), (1, 22, 21))
        self.assertRegex(err, r"\nnemotron: .*20 api_status.*\n\Z")
        self.assertEqual(self.main(answer(completion("x", "length")), "ab")[0], 3)
        self.assertEqual(self.main(answer("no", status=402), "ab")[0], 4)

    def test_20_failures_end_a_batch_whose_input_is_still_open(self):
        url = self.serve(answer("no", status=404)).url
        args = [*PROGRAM, "--batch", "-", "--base-url", url]
        process = self.popen(args, stdin=subprocess.PIPE)
        process.stdin.write(b"x\n" * 20)
        process.stdin.flush()
        self.assertEqual(process.wait(PATIENCE), 1)

    def test_kill_9_again_and_again(self):
        server = self.serve(echo)
        args = [*self.arguments(server, *map(str, range(60))), "-j", "4"]
        args += ["--output", self.rows]
        for _ in range(3):
            process = self.popen([*PROGRAM, *args])
            for _ in range(10):
                self.assertTrue(server.arrived.acquire(timeout=PATIENCE))
            process.kill()
            process.wait()
        whole = map(json.loads, self.rows.read_bytes().split(b"\n")[:-1])
        answered = {row["request"]["messages"][0]["content"] for row in whole}
        before = len(server.requests)
        self.assertEqual(main(*args)[:2], (0, ""))
        names = sorted(int(row["custom_id"][5:]) for row in self.read())
        self.assertEqual(names, list(range(1, 61)))
        again = {request.prompt for request in server.requests[before:]}
        self.assertEqual(answered & again, set())

    def limited(self, limit, lines, *args):
        """Run a batch with a limit on the size or the number of its files."""
        args = [*self.arguments(self.serve(echo), *lines), "--output", self.rows, *args]
        return run(f"ulimit {limit}; exec {shlex.join(map(str, [*PROGRAM, *args]))}")

    def test_a_full_disk_and_space_again(self):
        status, out, err = self.limited("-f 3", "abcdefghijkl")
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, r"\A(nemotron: .*\n)+\Z")
        self.assertIn("rows.jsonl", err)
        self.send("abcdefghijkl", model=nemotron.MODEL)
        names = sorted(int(row["custom_id"][5:]) for row in self.read())
        self.assertEqual(names, list(range(1, 13)))

    def test_few_files(self):
        self.assertEqual(self.limited("-n 10", map(str, range(60)), "-j", "40")[0], 0)
        self.assertEqual(len(self.read()), 60)

    def test_ctrl_c_keeps_the_rows(self):
        server = self.serve(echo, echo, echo, answer(end="stall"))
        process = self.popen([*PROGRAM, *self.arguments(server, *"abcdef")])
        rows = [json.loads(process.stdout.readline()) for _ in range(3)]
        status, _, err = self.interrupt(process)
        self.assertEqual((status, [row["error"] for row in rows]), (130, [None] * 3))
        self.assertRegex(err, r"\Anemotron: \d .*\n\Z")


# ------------------------------------------------------------------------ Command line


class ProgramCase(Case):
    def setUp(self):
        super().setUp()
        self.server = self.serve(echo)
        os.environ["DEEPINFRA_BASE_URL"] = self.server.url

    def load(self):
        return json.loads(self.file.read_text())

    def usage_error(self, *args):
        """Return the line on standard error; nothing is sent."""
        count = len(self.server.requests)
        status, out, err = main(*args)
        self.assertEqual((status, out, len(self.server.requests)), (2, "", count), args)
        self.assertRegex(err, r"\Anemotron: .{1,289}\n\Z")
        return err


class ProgramTests(ProgramCase):
    @each(
        words_and_input=("a", "text\n\n", "a\n\ntext"),
        input=("", "\ufefftext\r\n", "text"),
        input_between=("a - b c", "text", "a\n\ntext\n\nb c"),
        no_input=("-n a -", "text", "a -"),
        options_end=("-- -x y", "", "-x y"),
    )
    def test_prompt(self, args, stdin, expected):
        status, out, err = main("--dry-run", *args.split(), stdin=stdin.encode())
        prompt = json.loads(out)["messages"][-1]["content"]
        self.assertEqual((status, prompt, err), (0, expected, ""))

    def test_options_become_the_body(self):
        (self.folder / "tools.json").write_bytes(b'\xef\xbb\xbf[{"type": "x"}]')
        values = {"tool_choice": "auto", "user": "me", "stop": ["a", "b"]}
        args, expected = [], {"model": "m", "messages": [SYSTEM, USER], "stream": True}
        for name, kind, *_ in nemotron.PARAMETERS:
            if name not in ("n", "tools", "response_format"):
                value = values.get(name, 0.5 if kind == "a number" else 1)
                for one in value if isinstance(value, list) else [value]:
                    args += [f"--{name.replace('_', '-')}", one]
                expected[name] = value
        extra = {"logprobs": True, "text": "te xt", "n": 2, "min_p": "odd"}
        for key, value in extra.items():
            args += ["-o", key, value if isinstance(value, str) else json.dumps(value)]
        args += ["-o", "tools", f"@{self.folder / 'tools.json'}"]
        expected.update(extra, tools=[{"type": "x"}])
        status, out, err = main("--dry-run", *args, "-m", "m", "-s", "s", "u")
        self.assertEqual((status, err, out.count("\n")), (0, "", 1))
        self.assertEqual(json.loads(out), expected)
        out = main("--dry-run", "-n", "-m", "", "u")[1]  # as -m "$UNSET" gives
        self.assertEqual(json.loads(out)["model"], nemotron.MODEL)

    def test_usage_errors(self):
        bad = """--temperature 3 | --top-k 1.5 | --nonsense | --seed -1 | --timeout 0
            | -s | --retries x | --deadline soon | --base-url ftp://x | -j 5
            | --max-cost 5 | --temp 1 | --n 1 | -o n 2 | -o messages [] | -o x @none
            | --output f | --batch none"""
        for args in packed(bad):
            self.usage_error("x", *args.split())
        self.usage_error("--batch", README, "--max-cost", "-1")
        self.assertNotIn(TOKEN, self.usage_error("x", f"--token={TOKEN}"))
        self.assertIn("[options]", self.usage_error())

    def test_json_and_usage(self):
        status, out, err = main("--json", "-u", "-n", "a", "b")
        self.assertEqual((status, json.loads(out)), (0, completion("a b")))
        self.assertRegex(err, r"\Anemotron: 3 \+ 2 tokens, \$0\.25, .* s, .*\bm\n\Z")
        status, out, err = main("-u", "-n", "-m", "m", "a")
        self.assertRegex(err, r"\Anemotron: 3 \+ 2 tokens, \$0\.25, [\d.]+ s\n\Z")
        sent = [r.json.get("stream_options") for r in self.server.requests]
        self.assertEqual(sent, [None, {"include_usage": True}])

    @each(
        length=(answer(completion("a", "length")), 3, "a\n", "length"),
        abort=(sse(delta("a", "abort")), 3, "a\n", "abort"),
        cut=(sse(delta("a"), done=False), 3, "a\n", "no complete reply"),
        error=(sse(delta("a"), {"error": "Boom"}), 1, "a\n", "Boom"),
        compressed=(ZIPPED, 1, "", "compressed"),
        refused=(answer({"detail": "no"}, status=401), 4, "", "DEEPINFRA_TOKEN"),
        not_found=(answer("", status=404), 1, "", "/v1/chat/completions"),
        down=(answer("<title>x", status=503), 5, "", "Reason"),
        newlines=(sse(*map(delta, "hi\n\n\n"), END), 0, "hi\n", ""),
        empty=(answer(completion("")), 0, "\n", ""),
        controls=(answer(completion("\x1b[2J\r\t€")), 0, "\x1b[2J\r\t€\n", ""),
        surrogate=(sse(delta("half \ud83d"), END), 0, "half ?\n", ""),
    )
    def test_output_and_exit_statuses(self, reply, status, out, words):
        url = self.serve(reply).url
        got = main("-n", "x", "--retries", "0", "--base-url", url)
        self.assertEqual((got[0], got[1].replace("\ufffd", "?")), (status, out))
        self.assertRegex(got[2], r"\A(nemotron: .{1,289}\n)?\Z")
        self.assertEqual((words in got[2], bool(words)), (True, bool(got[2])))

    def test_help_and_version(self):
        self.assertEqual(main("--version"), (0, nemotron.__version__ + "\n", ""))
        status, out, err = main("-h")
        self.assertEqual((status, err), (0, ""))
        self.assertRegex(out, r"\nexamples:\n(  .*\n){3,}\nexit status")
        numbers = re.findall(r"^ +(\d+) ", out.rpartition("\nexit status")[2], re.M)
        self.assertEqual(numbers, ["0", "1", "2", "3", "4", "5", "130", "141"])

    @each(
        isolated=(["-I", "-S", "renamed.py"], b""),
        from_a_pipe=(["-"], (HERE / "nemotron.py").read_bytes()),
        in_a_package=(["-c", "from vendor.nemotron import main; main()"], b""),
    )
    def test_it_runs_wherever_it_is_copied(self, args, stdin):
        (self.folder / "vendor").mkdir(exist_ok=True)
        for name in ("renamed.py", "vendor/nemotron.py"):
            shutil.copy(HERE / "nemotron.py", self.folder / name)
        done = run([sys.executable, *args, "--offline", "Hi"], stdin, self.folder)
        self.assertEqual(done, (0, "Hi\n", ""))
        self.assertTrue(os.name == "nt" or os.access(HERE / "nemotron.py", os.X_OK))

    def test_import_is_quiet_and_small(self):
        code = "import sys, urllib.request, json, threading, random, reprlib; "
        code += "before = set(sys.modules); import nemotron; "
        code += "print(*sorted(set(sys.modules) - before))"
        bad = {"DEEPINFRA_BASE_URL": "nonsense", "DEEPINFRA_TOKEN": "\n"}
        status, out, err = run([sys.executable, "-c", code], cwd=HERE, **bad)
        self.assertEqual((status, err), (0, ""))
        self.assertLessEqual(set(out.split()), {"__future__", "nemotron", "select"})

    @posix
    @each(
        head=("-n x | head -n 1", 141, "word\n", r"\A\Z"),
        no_input=("--offline x <&-", 0, "x\n", r"\A\Z"),
        no_errors=("-n --offline x 2>&-", 0, "x\n", r"\A\Z"),
        no_output=("-n --offline x >&-", 2, "", r"\Anemotron: .*output.*\n\Z"),
        full=("-n --offline x >/dev/full", 1, "", r"\Anemotron: .*output.*space.*\n\Z"),
        help_full=("-h >/dev/full", 1, "", r"\Anemotron: .*\n\Z"),
        batch=("--batch <(seq 2000) | head -c1", 141, "{", r"\A\w+: \d{1,3} .*\n\Z"),
        utf_8=("--offline é€ <<<ü", 0, "é€\n\nü\n", r"\A\Z"),  # whatever the locale
    )
    def test_pipes_and_closed_files(self, command, status, out, err):
        if "/dev/full" in command and not os.path.exists("/dev/full"):
            self.skipTest("there is no /dev/full")
        text = sse(*[delta("word\n" * 1000)] * 200, END)
        url = self.serve(lambda r: text if r.json.get("stream") else echo(r)).url
        command = f"set -o pipefail; {shlex.join(PROGRAM)} {command}"
        env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        got = run(command, cwd=self.folder, DEEPINFRA_BASE_URL=url, **env)
        self.assertEqual(got[:2], (status, out))
        self.assertRegex(got[2], err)

    @posix
    def test_standard_input_is_waited_for_with_a_note(self):
        reader, writer = os.pipe()
        process = self.popen([*PROGRAM, "--offline", "--batch", "-"], stdin=reader)
        os.close(reader)
        note = process.stderr.readline().decode()
        self.assertRegex(note, r"\Anemotron: .*standard input.*-n.*\n\Z")
        os.write(writer, b"one\n")
        self.assertIn(b"line-1", process.stdout.readline())
        os.write(writer, b"late\n")
        os.close(writer)
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, out.count(b"line-2")), (0, 1))
        self.assertRegex(err, rb"\Anemotron: 2 of \? done.*\n\Z")

    @posix
    def test_signals_keep_what_has_arrived_and_the_conversation(self):
        before = json.dumps([USER, ASSISTANT])
        self.file.write_text(before)
        busy = answer("busy", status=500, headers={"Retry-After": "0"})
        server = self.serve(busy, sse(delta("part"), done=False, end="stall"))
        args = [*PROGRAM, "-n", "-c", self.file, "x", "--base-url", server.url]
        process = self.popen(args)
        self.assertEqual(process.stdout.read(4), b"part")
        status, out, err = self.interrupt(process)
        self.assertEqual((status, out), (130, "\n"))
        self.assertRegex(err, r"\Anemotron: .*busy.*\n\Z")
        self.assertEqual(self.file.read_text(), before)


class ConversationTests(ProgramCase):
    def test_turns_are_added(self):
        self.assertEqual(main("-n", "-c", self.file, "-s", "S", "1")[:2], (0, "1\n"))
        modes = [self.file.stat().st_mode & 0o777]
        self.file.chmod(0o640)
        self.assertEqual(main("-n", "-c", self.file, "2")[:2], (0, "2\n"))
        self.assertEqual(main("-n", "-c", self.file, "-s", "s", "3", "--json")[0], 0)
        modes.append(self.file.stat().st_mode & 0o777)
        turns = [{**turn, "content": c} for c in "123" for turn in (USER, ASSISTANT)]
        self.assertEqual(self.load(), [SYSTEM, *turns])
        sent = self.server.requests[-1].json["messages"]
        self.assertEqual(sent, [SYSTEM, *turns[:-1]])
        self.assertTrue(os.name == "nt" or modes == [0o600, 0o640], modes)
        self.assertEqual(list(self.folder.iterdir()), [self.file])

    @each(tool=([USER, CALLS, TOOL], 0), user=([USER], 0), assistant=([ASSISTANT], 2))
    def test_without_a_prompt(self, messages, status):
        self.file.write_text(json.dumps(messages))
        self.assertEqual(main("-n", "-c", self.file)[0], status)
        self.assertEqual(len(self.load()), len(messages) + (status == 0))

    @each(
        cut=(sse(delta("a"), done=False), 3, 2),
        html=(answer("<title>x</title>", headers=HTML), 1, 2),
        length=(answer(completion("cut", "length")), 3, 4),
    )
    def test_saved_once_the_reply_has_ended(self, reply, status, count):
        self.file.write_text(json.dumps([USER, ASSISTANT]))
        args = ("-n", "-c", self.file, "x", "--base-url", self.serve(reply).url)
        self.assertEqual(main("--dry-run", *args)[0], 0)
        self.assertEqual((main(*args)[0], len(self.load())), (status, count))

    def test_never_over_the_change_of_another_run(self):
        url = self.serve(lambda r: self.file.write_text("[]") and echo(r)).url
        status, out, err = main("-n", "-c", self.file, "x", "--base-url", url)
        self.assertEqual((status, out, self.file.read_text()), (1, "x\n", "[]"))
        self.assertRegex(err, r"\Anemotron: .*chat\.json.*\n\Z")

    @posix
    def test_odd_files(self):
        self.file.symlink_to(self.folder / "there.json")
        for _ in range(2):
            self.assertEqual(main("-n", "-c", self.file, "x")[0], 0)
        self.assertEqual((self.file.is_symlink(), len(self.load())), (True, 4))
        os.mkfifo(self.folder / "fifo")
        for path in (self.folder / "fifo", self.folder):
            self.usage_error("-n", "-c", path, "x")
        err = self.usage_error("-n", "-c", self.folder / "no" / "x", "x")
        self.assertIn("No such file", err)

    def test_bad_files_are_usage_errors(self):
        for text in ("", "{}", '"x"', "[1]", "[" * 100000, "[\xff"):
            self.file.write_bytes(text.encode("latin-1"))
            self.assertIn("chat.json", self.usage_error("-n", "-c", self.file, "x"))
            self.assertEqual(self.file.read_bytes(), text.encode("latin-1"))

    def test_a_chat_from_a_pipe(self):
        overrun = answer("maximum context length is 4096", status=400)
        server = self.serve(echo, overrun, echo)
        args = ("-i", "-c", self.file, "first", "turn", "--base-url", server.url)
        status, out, err = main(*args, stdin=b"two\n\n \nthree\nexit\nfour\n")
        self.assertEqual((status, out), (0, "first turn\nthree\n"))
        self.assertRegex(err, r"\Anemotron: .*shorten it.*\n\Z")
        self.assertEqual(len(self.load()), 4)
        self.assertEqual(len(server.requests[-1].json["messages"]), 3)


# --------------------------------------------------------------------------- Terminals


class Terminal:
    """The program on a pseudo-terminal of its own, with Ctrl-C and all."""

    START = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    START += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"

    def __init__(self, case, *args, url=None, stdout=None):
        self.file, terminal = os.openpty()
        case.addCleanup(os.close, self.file)
        url = url or case.server.url
        env = environment(TERM="xterm", COLUMNS="80", DEEPINFRA_BASE_URL=url)
        files = {"stdin": terminal, "stdout": stdout or terminal, "stderr": terminal}
        args = [sys.executable, "-S", "-c", self.START, *PROGRAM[1:], *args]
        self.process = case.popen(args, env=env, start_new_session=True, **files)
        os.close(terminal)
        self.seen = ""

    def read(self, seconds=PATIENCE):
        """Add what comes to `seen`; return whether something came."""
        new = b""
        with contextlib.suppress(OSError):  # the end, as Linux says it
            if select.select([self.file], [], [], seconds)[0]:
                new = os.read(self.file, 4096)
        self.seen = re.sub(r"\x1b\[\?2004[hl]\r?", "", self.seen + new.decode())
        return bool(new)

    def expect(self, *texts):
        """Wait until each text is on the screen, and forget all up to it."""
        for text in texts:
            while text not in self.seen:
                if not self.read():
                    raise AssertionError(f"{text!r} did not come: {self.seen!r}")
            self.seen = self.seen.partition(text)[2]

    def send(self, text):
        os.write(self.file, text.encode())

    def interrupt(self, text):
        """Press Ctrl-C until the text comes: readline loses one before it waits."""
        while self.read(0.05):
            pass
        for _ in range(PATIENCE):
            if text not in self.seen:
                self.send("\x03")
            while text not in self.seen and self.read(1):
                pass
        self.expect(text)

    def end(self):
        """Return the exit status, and the rest of what was on the screen."""
        while self.read():
            pass
        return self.process.wait(PATIENCE), self.seen


@posix
class TerminalTests(ProgramCase):
    def test_a_chat(self):
        server = self.serve(echo, sse(delta("endless"), done=False, end="stall"), echo)
        screen = Terminal(self, "-i", "-u", "-c", self.file, "hello", url=server.url)
        screen.expect("hello\r\nnemotron: 3 + 2 tokens", "> ")
        screen.send("one\r")
        screen.expect("one\r\n", "endless")
        screen.interrupt("dropped")
        screen.expect("> ")
        screen.send("half a li")
        screen.expect("half a li")
        screen.interrupt("> ")
        screen.send("two\r")
        screen.expect("two\r\n", "two\r\nnemotron: 3 + 2 tokens", "> ")
        screen.send("exit\r")
        self.assertEqual(screen.end()[0], 0)
        contents = [turn["content"] for turn in self.load()]
        self.assertEqual(contents, ["hello", "hello", "two", "two"])
        self.assertEqual(len(server.requests), 3)

    @unittest.skipUnless(GNU_READLINE, "needs GNU readline")
    def test_history_and_a_paste(self):
        screen = Terminal(self, "-i")
        screen.expect("> ")
        screen.send("\x1b[200~one\ntwo\x1b[201~\r")
        screen.expect("two\r\n", "one\r\ntwo\r\n", "> ")
        screen.send("three\r")
        screen.expect("three\r\n", "three\r\n", "> ")
        screen.send("\x1b[A\r")  # the line before
        screen.expect("three\r\n", "three\r\n", "> ")
        screen.send("\x04")
        self.assertEqual(screen.end()[0], 0)
        self.assertEqual(self.server.sent(), "one\ntwothreethree")

    def test_a_chat_whose_output_is_a_file(self):
        with open(self.rows, "wb") as out:
            screen = Terminal(self, "-i", stdout=out)
            screen.expect("> ")
            screen.send("one\r")
            screen.expect("one\r\n", "> ")
            screen.send("\x04")
            self.assertEqual(screen.end()[0], 0)
        self.assertEqual(self.rows.read_bytes(), b"one\n")

    def test_standard_input_is_a_terminal_and_escapes_are_shown(self):
        status, seen = Terminal(self).end()
        self.assertEqual(status, 2)
        self.assertRegex(seen, r"\Anemotron: .*\[options\].*\r\n\Z")
        text = "\x1b[31mred\x07\x9b2J\u202etxt\u2066\n\ttab\x7f"
        shown = "\\x1b[31mred\\x07\\x9b2J\\u202etxt\\u2066\r\n\ttab\\x7f\r\n"
        server = self.serve(sse(*map(delta, text), END))
        screen = Terminal(self, "a", "-", url=server.url)
        screen.send("typed\r\x04")
        status, seen = screen.end()
        self.assertEqual((status, seen[-len(shown) :]), (0, shown))
        self.assertEqual(server.sent(), "a\n\ntyped")

    def test_progress_of_a_batch(self):
        requests, steps = self.folder / "requests.txt", threading.Semaphore(0)
        requests.write_text("a\n" * 3)
        server = self.serve(lambda request: steps.acquire(timeout=60) and echo(request))
        args = ("--batch", requests, "--output", self.rows, "-j", "1")
        screen = Terminal(self, *args, url=server.url)
        steps.release()
        screen.expect("\r1 of 3 done, 0 failed", " left")
        steps.release(2)
        status, rest = screen.end()
        self.assertEqual((status, self.rows.read_bytes().count(b"\n")), (0, 3))
        self.assertRegex(rest, r"\r +\rnemotron: 3 of 3 done, 0 failed, .*s\r\n\Z")


# ----------------------------------------------------------------------- Documentation

# What curl is sent must be JSON.
TOOLS = f"""python3() {{ {shlex.quote(sys.executable)} -S "$@"; }}
curl() {{ python3 -m json.tool; }}
"""
TEST = "import unittest as u\nclass Test(u.TestCase): test = lambda self: None\n"
PYSPARK = "from unittest.mock import MagicMock as SparkContext"


@unittest.skipUnless(README.exists(), "README.md is not here")
class ReadmeTests(Case):
    text = README.read_text(encoding="utf-8") if README.exists() else ""

    def check_blocks(self, language, command, before=""):
        """Run all blocks of a language in order, in one folder."""
        shutil.copy(HERE / "nemotron.py", self.folder)
        (self.folder / "test_it.py").write_text(TEST)
        (self.folder / "pyspark.py").write_text(PYSPARK)
        env = {"DEEPINFRA_BASE_URL": self.serve(echo).url, "DEEPINFRA_TOKEN": TOKEN}
        blocks = re.findall(rf"^```{language}\n(.*?)^```", self.text, re.M | re.S)
        self.assertGreater(len(blocks), 3)
        for block in blocks:
            with self.subTest(block):
                done = run([*command, before + block], b"", self.folder, **env)
                self.assertEqual(done[0], 0, done[2])
                self.assertNotIn("Traceback", done[2])

    def test_python_examples(self):
        self.check_blocks("python", [sys.executable, "-S", "-W", "error", "-c"])

    @unittest.skipUnless(shutil.which("bash"), "needs bash")
    def test_shell_examples(self):
        self.check_blocks("sh", ["bash", "-euo", "pipefail", "-c"], TOOLS)

    def test_tables(self):
        rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|(.*)\|$", self.text, re.M)
        rows = [[cell.strip(" `") for cell in row] for row in rows]
        self.assertEqual(rows, list(map(list, nemotron.PARAMETERS)))
        numbers = re.findall(r"^\| ([\d, ]+) \|", self.text, re.M)
        self.assertEqual(", ".join(numbers), "0, 1, 2, 3, 4, 5, 130, 141")


if __name__ == "__main__":
    unittest.main()
