"""A server with OpenAI's chat completions and Anthropic's messages over HTTP, and the faults of real ones."""

import contextlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from logitcask.pipeline.generate_data.generate import generate_data
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.generate_data import GenerateDataSettings

STATUS = {"400": 400, "401": 401, "404": 404, "429": 429, "500": 500, "529": 529}
INPUT_TOKENS, OUTPUT_TOKENS = 100, 50  # of every reply


@dataclass
class ModelServer:
    """``faults``: what goes wrong in a prompt's first requests, in order; ``always``: in every request."""

    port: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    always: str = ""
    delay: float = 0.0  # seconds per reply
    replies: dict[str, str] = field(default_factory=dict)
    retry_after: str = "1"
    asked: list[str] = field(default_factory=list)  # the prompt of each request, in order of arrival
    answered: Counter[str] = field(default_factory=Counter)  # prompts whose reply was sent completely
    at: list[float] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reply(self, prompt: str) -> str:
        """Return a text that is unique to the prompt."""
        return self.replies.get(prompt, " ".join(f"{prompt.replace(' ', '-')}{n}" for n in range(8)))


def openai_body(text: str | None, finish: str = "stop", **message: object) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {
            "prompt_tokens": INPUT_TOKENS,
            "completion_tokens": OUTPUT_TOKENS,
            "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
        },
    }


def anthropic_body(text: str | None, stop: str = "end_turn") -> dict[str, Any]:
    blocks = [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [] if text is None else [*blocks, {"type": "text", "text": text}],
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS},
    }


def body_of(fault: str, text: str, anthropic: bool) -> dict[str, Any]:
    """Return the body of a reply with status 200."""
    if fault == "shapeless":
        return {"object": "chat.completion", "choices": [], "content": None}
    if fault == "empty":
        return anthropic_body(None) if anthropic else openai_body(None)
    if fault == "length":
        return anthropic_body(text, "max_tokens") if anthropic else openai_body(text, "length")
    if fault == "refusal":
        return anthropic_body(text, "refusal") if anthropic else openai_body(None, refusal="I cannot.")
    body = anthropic_body(text) if anthropic else openai_body(text)
    if fault == "no usage":
        del body["usage"]
    return body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with state.lock:
            state.asked.append(prompt)
            state.at.append(time.monotonic())
            state.headers.append({name.lower(): value for name, value in self.headers.items()})
            state.bodies.append(body)
            fault = state.always or (state.faults[prompt].pop(0) if state.faults.get(prompt) else "")
            state.running += 1
            state.most_running = max(state.most_running, state.running)
        try:
            self.answer(state, prompt, fault)
        finally:
            with state.lock:
                state.running -= 1

    def answer(self, state: ModelServer, prompt: str, fault: str) -> None:
        time.sleep(30 if fault == "timeout" else state.delay)
        if fault in STATUS:
            message = f"no, {self.headers.get('Authorization')}"  # some servers echo what they were sent
            error = {"type": "error", "error": {"type": "some_error", "message": message}}
            extra = {"retry-after": state.retry_after} if fault == "429" else {}
            self.send(STATUS[fault], json.dumps(error).encode(), extra)
        elif fault == "garbage":
            self.send(200, b'{"id": "x", "choices": [{"message"')
        elif fault == "html":
            self.send(200, b"<html>It works!</html>", {"Content-Type": "text/html"})
        else:
            anthropic = self.path.endswith("/v1/messages")
            assert anthropic or self.path.endswith("/chat/completions"), self.path
            data = json.dumps(body_of(fault, state.reply(prompt), anthropic)).encode()
            self.send(200, data, cut=fault == "cut")
            state.answered[prompt] += 1

    def send(self, status: int, data: bytes, more: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(more or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    state: ModelServer

    def handle_error(self, *_: object) -> None:
        """Ignore clients that hang up."""


@contextlib.contextmanager
def model_server() -> Iterator[ModelServer]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.state = ModelServer(port=server.server_address[1])
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server.state
        finally:
            server.shutdown()


KEY = "sk-a-secret-of-ours"
PROVIDERS = ("openai", "anthropic", "openai-compatible")


@contextlib.contextmanager
def model_server_with_keys() -> Iterator[ModelServer]:
    """Start a server, and set the environment variables that point to it and hold its keys."""
    with model_server() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENAI_COMPATIBLE_API_KEY"):
            patch.setenv(name, KEY)
        patch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        patch.setenv("ANTHROPIC_BASE_URL", server.url)
        yield server


def options(
    server: ModelServer, folder: Path, prompts: int, provider: str = "openai", **more: object
) -> dict[str, Any]:
    """Return options that ask ``prompts`` prompts."""
    path = folder / "prompts.yaml"
    topics = [f"word{n}" for n in range(40)]
    path.write_text(f"languages: [python, go]\ntopics: {topics}\ncategories: {{a: ['{{language}} {{topic}}']}}\n")
    values = {"provider": provider, "model": "m", "prompts": path, "output_dir": folder / "out"}
    if provider == "openai-compatible":
        values["base_url"] = f"{server.url}/v1"
    return {**values, "num_examples": prompts, "validation_fraction": 0, **more}


def generate(server: ModelServer, folder: Path, prompts: int, provider: str = "openai", **more: Any) -> str:
    return generate_data(resolve(GenerateDataSettings, None, options(server, folder, prompts, provider, **more)))


def records(folder: Path, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "manifest.json").read_text())
    return content


def command(values: dict[str, Any]) -> list[str]:
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "logitcask", "generate-data", *words]
