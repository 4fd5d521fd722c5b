"""The teacher behind servers: it scores whole texts, many at a time, and every label is a head at T=1.

A server is checked before it is used, and whenever it was away: that it serves the model, splits texts as the tokenizer
does, and gives a probe text the log-probabilities that the others give it.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.cache.fidelity import FidelitySums
from logitcask.cache.labels import FloatArray, IntArray, SparseTargets
from logitcask.cache.manifest import LabelSettings, TeacherIdentity, sha256
from logitcask.pipeline.teachers.served.replies import SGLANG, VLLM, Protocol, ReplyError, read_head, remedy_of_cap
from logitcask.pipeline.teachers.served.servers import KEY_VARIABLE, Connection, RefusedError, Server, Servers
from logitcask.pipeline.teachers.teacher import Labelled, TeacherFacts, TokenizedExample, made_by, teacher_id
from logitcask.pipeline.text.tokenizer import PROBES, load_tokenizer, tokenizer_size

ENGINE = "server"
SAME_WEIGHTS = 0.25  # nats by which they may differ on average: above rounding in few bits, below other weights
IMPROBABLE = -15.0  # nats, below which log-probabilities are not compared
PROBE_TOKENS = 48
SAMPLED_TOKENS = 200  # of the vocabulary, in the last text by which tokenizers are compared


@dataclass(frozen=True)
class Known:
    """What a server's check found out."""

    protocol: Protocol
    model: str  # as requests name it
    max_length: int | None  # tokens of a text that it scores
    version: str


class ServedTeacher:
    """A causal language model behind servers."""

    def __init__(self, model: str, connection: Connection, tokenizer: PreTrainedTokenizerBase, head_size: int) -> None:
        """Wait for one of the servers. Raises LogitcaskError if none answers, or one serves another model."""
        self._model, self._tokenizer, self._head_size = model, tokenizer, head_size
        self._vocab = tokenizer_size(tokenizer)
        self._reference: tuple[str, FloatArray] | None = None
        self._lock = threading.Lock()
        self._servers = Servers(connection, self._check)
        self._begun: dict[int, Future[SparseTargets]] = {}
        self._threads = _Threads(connection.concurrency * len(connection.urls))
        known: Known = self._servers.ask(lambda server: server.known)
        name = teacher_id(model)
        identity = TeacherIdentity(id=name, revision="", weights=sha256(name.encode()), dtype="unknown", engine=ENGINE)
        maker = made_by(ENGINE, "", **{known.protocol.name: known.version})
        self.facts = TeacherFacts(identity, maker, self._vocab, known.max_length)

    def expect(self, batches: Sequence[Sequence[TokenizedExample]], label: LabelSettings) -> None:
        """Start labelling: the servers stay busy while the labels before are written."""
        for example in (example for batch in batches for example in batch):
            self._begin(example, label)

    def label(self, batch: Sequence[TokenizedExample], label: LabelSettings) -> Labelled:
        """Return the labels of each example's target positions."""
        for example in batch:
            self._begin(example, label)
        try:
            targets = [self._begun.pop(example.index).result() for example in batch]
        except BaseException:
            self._servers.stop()
            raise
        return Labelled(targets, FidelitySums.zeros(label.temperatures))

    def _begin(self, example: TokenizedExample, label: LabelSettings) -> None:
        if example.index not in self._begun:
            self._begun[example.index] = self._threads.start(lambda: self._label_one(example, label))

    def _label_one(self, example: TokenizedExample, label: LabelSettings) -> SparseTargets:
        at = np.flatnonzero(example.target_mask)

        def request(server: Server) -> SparseTargets:
            try:
                return self._score(server, server.known, example.input_ids, at)
            except ReplyError as error:
                raise LogitcaskError(f"{server.url}: its reply to example {example.index} {error}") from error

        return self._servers.ask(request)

    def _score(self, server: Server, known: Known, text: IntArray, at: IntArray) -> SparseTargets:
        body = known.protocol.body(known.model, text.tolist(), int(at[0]), self._head_size)
        try:
            reply = self._servers.post(server, known.protocol.path, body)
        except RefusedError as error:
            capped = "logprobs" in str(error) and "max allowed" in str(error)
            remedy = remedy_of_cap(self._head_size) if capped else _remedy(error)
            raise LogitcaskError(f"{server.url}{error}: {remedy}") from error
        return read_head(known.protocol, reply, text, at, self._head_size, self._vocab)

    def _check(self, server: Server) -> Known:
        known = self._identify(server)
        needed = self.facts.max_length if self._reference is not None else None
        if needed is not None and (known.max_length or needed) < needed:
            raise LogitcaskError(
                f"{server.url}: scores texts of at most {known.max_length} tokens, another server {needed}: start all "
                "with the same length"
            )
        self._require_tokenizer(server, known)
        text = np.array(
            self._tokenizer.encode(" ".join(PROBES), add_special_tokens=False)[:PROBE_TOKENS], dtype=np.int64
        )
        try:
            gold = self._score(server, known, text, np.arange(len(text) - 1)).gold_logprobs
        except ReplyError as error:
            raise LogitcaskError(f"{server.url}: its reply to a probe text {error}") from error
        with self._lock:
            self._reference = url, expected = self._reference or (server.url, gold)
        difference = distance(gold, expected)
        if difference > SAME_WEIGHTS:
            raise LogitcaskError(
                f"{server.url}: its log-probabilities of a probe text differ by {difference:.3g} nats from those that "
                f"{url} gave: all must serve the same weights"
            )
        return known

    def _identify(self, server: Server) -> Known:
        try:
            models = self._servers.get(server, "/v1/models")
            cards = {str(card["id"]): card for card in models["data"]}
            roots = {str(card.get("root")): card for card in models["data"]}
        except RefusedError as error:
            raise LogitcaskError(f"{server.url}{error}: {_remedy(error)}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise LogitcaskError(
                f"{server.url}/v1/models: no list of models: is it a server of vLLM or SGLang?"
            ) from error
        card = cards.get(self._model) or roots.get(self._model)
        if card is None:
            served = ", ".join(shown(name) for name in cards)
            raise LogitcaskError(
                f"{server.url}: serves {served}, not {self._model}: give that as --teacher-model, and the model's hub "
                "id or folder as --tokenizer"
            )
        protocol = SGLANG if card.get("owned_by") == "sglang" else VLLM
        length = card.get("max_model_len")
        longest = length - 1 if isinstance(length, int) and length > 0 else None  # it always generates a token
        return Known(protocol, str(card["id"]), longest, self._version(server, protocol))

    def _version(self, server: Server, protocol: Protocol) -> str:
        for path in ("/version",) if protocol is VLLM else ("/server_info", "/get_server_info"):
            with contextlib.suppress(RefusedError, KeyError, TypeError):
                return str(self._servers.get(server, path)["version"])[:100]
        return "unknown"

    def _require_tokenizer(self, server: Server, known: Known) -> None:
        """Raise LogitcaskError unless the server splits texts as the tokenizer does."""
        spread = np.linspace(0, self._vocab - 1, SAMPLED_TOKENS).astype(int).tolist()
        for text in (*PROBES, str(self._tokenizer.decode(spread))):
            own = self._tokenizer.encode(text, add_special_tokens=False)
            body = {"model": known.model, "prompt": text, "add_special_tokens": False}
            try:
                tokens = self._servers.post(server, "/tokenize", body)["tokens"]
            except (RefusedError, KeyError, TypeError) as error:
                if known.protocol is not SGLANG:
                    raise LogitcaskError(
                        f"{server.url}/tokenize: does not answer ({error}): give the server's own URL, not that of a "
                        "gateway which lacks it"
                    ) from error
                own = self._tokenizer.encode(text)
                tokens = self._tokens_of_sglang(server, text, own)
            if tokens != own:
                raise LogitcaskError(
                    f"{server.url}: its tokenizer splits {shown(text, 40)} otherwise: give the served model's own as "
                    "--tokenizer"
                )

    def _tokens_of_sglang(self, server: Server, text: str, expected: list[int]) -> list[int]:
        """Return the tokens that an SGLang without /tokenize scores in a text, its special ones around it.

        It writes 0 for the last of its vocabulary: where it does, the token expected there is returned.
        """
        body = {**SGLANG.body("", [], 0, 1), "text": text}
        del body["input_ids"]
        try:
            scored = self._servers.post(server, SGLANG.path, body)["meta_info"]["input_token_logprobs"]
            unknown = [*expected, *[0] * len(scored)]
            return [int(entry[1]) or unknown[place] for place, entry in enumerate(scored)]
        except (RefusedError, KeyError, TypeError, IndexError) as error:
            raise LogitcaskError(f"{server.url}{SGLANG.path}: does not score a text: {error}") from error


def load_served_teacher(
    model: str, connection: Connection, tokenizer: str, *, revision: str | None, trust_remote_code: bool, head_size: int
) -> ServedTeacher:
    """Connect to the servers of a model. Raises LogitcaskError if none answers or one does not fit the tokenizer."""
    loaded = load_tokenizer(tokenizer, revision=revision, trust_remote_code=trust_remote_code)
    return ServedTeacher(model, connection, loaded, head_size)


def distance(one: FloatArray, other: FloatArray, rounding: float = 0.0) -> float:
    """Return by how many nats log-probabilities of the same tokens differ on average, beyond a rounding of each."""
    low = np.float32(IMPROBABLE)
    apart = np.abs(np.maximum(one, low) - np.maximum(other, low))
    return float(np.maximum(0.0, apart - rounding).mean())


def _remedy(error: RefusedError) -> str:
    if error.status in (401, 403):
        return f"set the environment variable {KEY_VARIABLE}"
    if error.status == 404:
        return "is it a server of vLLM or SGLang, and --base-url its root or /v1?"
    return "correct that and run the same command again; committed shards are kept"


@dataclass
class _Threads:
    """Threads that end with the process, whatever they wait for."""

    count: int
    _calls: "queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        for _ in range(self.count):
            threading.Thread(target=self._work, daemon=True).start()

    def start(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
