"""A server that scores texts with a tiny real model over HTTP, as vLLM and SGLang do, and the faults of real ones."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from logitcask.pipeline.text.tokenizer import load_tokenizer

Reply = dict[str, Any]


@dataclass
class ScoreServer:
    """What a server serves, and what went on. ``faults``: what goes wrong in the next requests for scores, in order."""

    folder: Path
    kind: str = "vllm"
    name: str = "tiny"
    port: int = 0
    most_logprobs: int = 20
    max_model_len: int = 128
    faults: list[str] = field(default_factory=list)
    spoil: Callable[[Reply], Reply] = lambda reply: reply  # each reply with scores
    has_tokenize: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of requests for scores
    keys: set[str | None] = field(default_factory=set)
    running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.model = LlamaForCausalLM.from_pretrained(self.folder).eval()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(self.folder))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def scores(self, ids: list[int], count: int) -> list[tuple[float, int, list[tuple[int, float]]]]:
        """Return, for each token but the first, its log-probability, its rank and the most probable tokens."""
        with self.lock, torch.inference_mode():  # one text at a time: the numbers depend on nothing else
            rows = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        top = rows.topk(count) if count else None
        return [
            (
                float(row[token]),
                int((row > row[token]).sum()) + 1,
                list(zip(top.indices[place].tolist(), top.values[place].tolist(), strict=True)) if top else [],
            )
            for place, (row, token) in enumerate(zip(rows[:-1], ids[1:], strict=True))
        ]

    def vllm(self, body: dict[str, Any]) -> Reply:
        """Return the reply of ``/v1/completions``; ids are texts, as in JSON."""
        ids, count = body["prompt"], body["prompt_logprobs"]
        scored: list[dict[str, Any] | None] = [None]
        for token, (own, rank, top) in zip(ids[1:], self.scores(ids, count), strict=True):
            row = {str(token): {"logprob": own, "rank": rank, "decoded_token": "x"}}
            row |= {str(t): {"logprob": v, "rank": n + 1, "decoded_token": "x"} for n, (t, v) in enumerate(top)}
            scored.append(row)
        return {"id": "cmpl-1", "model": self.name, "choices": [{"index": 0, "text": "x", "prompt_logprobs": scored}]}

    def sglang(self, body: dict[str, Any]) -> Reply:
        """Return the reply of ``/generate``: from ``logprob_start_len`` on, the first entry null."""
        ids = body["input_ids"] if "input_ids" in body else self.tokenizer.encode(body["text"])
        start = body["logprob_start_len"]
        scored = self.scores(ids, body["top_logprobs_num"])[start:]
        shown = [token if token < self.model.config.vocab_size - 1 else 0 for token in ids[start:]]
        own = [[None, shown[0], None], *([o, t, None] for t, (o, _, _) in zip(shown[1:], scored, strict=True))]
        tops = [None, *([[v, t, None] for t, v in top] for _, _, top in scored)]
        return {"text": "x", "meta_info": {"id": "1", "input_token_logprobs": own, "input_top_logprobs": tops}}

    def chat(self, body: dict[str, Any]) -> Reply:
        """Return the reply of ``/v1/chat/completions``: 9 tokens drawn by the prompt's own seed, then the end."""
        count = body["top_logprobs"]
        prompt = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        generator = torch.Generator().manual_seed(sum(prompt))
        tokens: list[int] = []
        content = []
        while len(tokens) < 10:
            with self.lock, torch.inference_mode():
                row = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float().log_softmax(-1)
            drawn = int(torch.multinomial((row / body["temperature"]).softmax(-1), 1, generator=generator))
            token = drawn if len(tokens) < 9 else ends(self.tokenizer)
            top = row.topk(count)
            ranked = dict(zip([token, *top.indices.tolist()], [float(row[token]), *top.values.tolist()], strict=True))
            entries = [{"token": f"token_id:{each}", "logprob": value, "bytes": []} for each, value in ranked.items()]
            content.append({**entries[0], "top_logprobs": entries[:count]})
            tokens.append(token)
        message = {"role": "assistant", "content": self.tokenizer.decode(tokens, skip_special_tokens=True)}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "token_ids": tokens}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 10, "total_tokens": len(prompt) + 10}
        return {"id": "chat-1", "object": "chat.completion", "created": 1, "model": self.name, "usage": usage,
                "prompt_token_ids": prompt, "choices": [{**choice, "logprobs": {"content": content}}]}  # fmt: skip


def ends(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends an answer."""
    token = tokenizer.eos_token_id
    assert isinstance(token, int)
    return token


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        state = self.server.state
        card = {
            "id": state.name,
            "root": str(state.folder),
            "owned_by": state.kind,
            "max_model_len": state.max_model_len,
        }
        answers = {"/v1/models": {"object": "list", "data": [card]}, "/version": {"version": "1.2"},
                   "/server_info": {"version": "3.4"}}  # fmt: skip
        self.send(200 if self.path in answers else 404, answers.get(self.path, {}))

    def do_POST(self) -> None:
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state.keys.add(self.headers.get("Authorization"))
        if self.path == "/tokenize" and state.has_tokenize:
            ids = state.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            self.send(200, {"tokens": ids, "count": len(ids)})
        elif self.path in {"vllm": ("/v1/completions", "/v1/chat/completions"), "sglang": ("/generate",)}[state.kind]:
            with state.lock:
                state.bodies.append(body)
                fault = state.faults.pop(0) if state.faults else ""
                state.running += 1
                state.most_running = max(state.most_running, state.running)
            try:
                status, reply = self.score(state, body, fault)
            finally:
                with state.lock:  # before the client has the reply, and asks again
                    state.running -= 1
            self.send(status, reply, retry_after="0.1", cut=fault == "cut" and status == 200)
        else:
            self.send(404, {"detail": "Not Found"})

    def score(self, state: ScoreServer, body: dict[str, Any], fault: str) -> tuple[int, object]:
        asked = body.get("prompt_logprobs", body.get("top_logprobs", 0))
        if state.kind == "vllm" and asked > state.most_logprobs:
            words = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {state.most_logprobs}"
            return 400, {"error": {"message": words, "type": "BadRequestError", "code": 400}}
        if fault in ("400", "401", "429", "500", "503"):
            return int(fault), {"error": {"message": f"no, {self.headers.get('Authorization')}"}}
        answer = state.chat if "messages" in body else state.vllm if state.kind == "vllm" else state.sglang
        return 200, state.spoil(answer(body))

    def send(self, status: int, value: object, *, retry_after: str = "", cut: bool = False) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        if retry_after and status == 429:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    state: ScoreServer

    def handle_error(self, *_: object) -> None:
        """Ignore clients that hang up."""


@contextlib.contextmanager
def serving(state: ScoreServer) -> Iterator[ScoreServer]:
    """Serve; the port is the one of before if there was one."""
    with Server(("127.0.0.1", state.port), Handler) as server:
        server.state, state.port = state, server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield state
        finally:
            server.shutdown()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
