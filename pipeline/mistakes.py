"""A user's mistake as three lines: what is wrong, how to fix it, where to read more; and what people type instead."""

import difflib
import re
from collections.abc import Collection

VERBS = (
    "give use leave choose run pip add make copy start write wait name lower create correct raise take remove fix ask "
    "set finish try serve merge upgrade download rename check see did call shorten cut resume install push mount free "
    "do log pass save train report stop mix unset evaluate"
)
FIX = re.compile(rf"[:;] (?=(?:{'|'.join(VERBS.split())}) )")  # before what to do
INSIDE = re.compile(r"""(?<!\w)(['"]).*?\1(?!\w)|\([^()]*\)""")  # a quoted value, or what is in parentheses
MANUAL = "docs/reference/errors.md"
# words of messages, "…" for what differs, by the anchors of that page: tests/cli/test_mistakes.py compares them
SECTIONS = {
    "memory-runs-out-in-training-stage-1-evaluate-or-generate": "memory ran out (",
    "the-system-ended-a---num-workers-process": "a process that reads batches was killed",
    "the-disk-is-full-in-stage-1": "cannot write the cache: ",
    "the-disk-is-full-in-training": ": cannot save: …make room, then ",
    "the-disk-of-temporary-files-is-full": ": no space is left there for temporary files: ",
    "the-runs-folder-is-gone": ": mount or move the folder back, then resume with ",
    "an-option-is-given-twice": ": is given twice, ",
    "windows": "writing needs file locks, which this system lacks",
    "a-chats-template-ignores-a-turn": "the chat template drops message ",
    "some-records-cannot-be-used": " bad records of ",
    "the-data-are-not-found": ": neither a file nor a data set that could be loaded: ",
    "the-examples-are-longer-than-the-student-takes": "the student's max_position_embeddings is ",
    "no-vllm": "--engine vllm needs vLLM: ",
    "the-server-gives-fewer-tokens": "start vLLM with --max-logprobs ",
    "vllms-labels-are-off": " and transformers disagree: ",
    "no-key-of-the-provider": " needs a key: set the environment variable ",
    "the-hub-cannot-be-reached-or-the-name-is-wrong": ": no tokenizer could be loaded: ",
    "the-students-tokenizer-is-another": ": was made with another tokenizer than ",
    "the-temperature-is-not-in-the-cache": " is not stored in the cache: it holds ",
    "the-cache-is-damaged": " is damaged: …; run logitcask cache verify --repair",
    "a-power-cut-tore-the-caches-own-files": " is missing or damaged, and this run would write another one: ",
    "a-cache-was-replaced-while-it-was-read": ": was replaced by another cache, or removed, while it was read",
    "the-cache-is-not-finished": " shards are committed: finish it with the same ",
    "the-cache-is-of-another-version": ": cache format … is not readable: ",
    "two-runs-on-one-cache": ": another run is writing this cache: ",
    "stage-1-was-started-with-other-settings": ": holds a cache made from other inputs: ",
    "the-bucket-or-host-cannot-be-reached": ": no connection after … tries: ",
    "the-loss-became-nan-or-infinite": "step …: non-finite: loss ",
    "the-runs-folder-is-in-use": ": not an empty folder: choose another, or resume ",
    "two-runs-in-one-folder": ": another run is training in it: ",
    "nothing-to-resume-from": " holds no complete checkpoint: ",
    "caches-of-two-kinds-of-labels-are-mixed": ": has no exact labels: mix caches of one kind, ",
    "resuming-is-refused": ": is a checkpoint of another run: ",
}

LENGTH = ("--max-seq-length", "--max-new-tokens")
MODEL = ("--student-model", "--teacher-model", "--model")
DATA = ("--train-data", "--data", "--cache")
PLACE = ("--output-dir", "--output")
OTHERS = ("--training-args",)
WORKERS = ("--num-workers", "--tokenize-workers", "--workers")
SYNONYMS: dict[str, tuple[str, ...]] = {  # what is typed: the options that may be meant, of which a command has some
    **dict.fromkeys(("--lr", "--rate", "--learning_rate"), ("--learning-rate",)),
    **dict.fromkeys(("--bf16", "--fp16", "--amp", "--mixed-precision"), ("--use-mixed-precision", "--dtype")),
    **dict.fromkeys(("--precision", "--torch-dtype", "--dtype"),
                    ("--dtype", "--student-dtype", "--mixed-precision-dtype")),
    **dict.fromkeys(("--max-length", "--max-len", "--max-model-len", "--seq-len", "--seq-length", "--context-length",
                     "--block-size", "--cutoff-len", "--max-tokens"), LENGTH),
    **dict.fromkeys(("--num-train-epochs", "--num-epochs", "--epoch", "--n-epochs"), ("--epochs",)),
    **dict.fromkeys(("--steps", "--num-steps", "--max-train-steps", "--total-steps"), ("--max-steps",)),
    **dict.fromkeys(("--model", "--model-name", "--model-id", "--model-name-or-path", "--base-model"), MODEL),
    **dict.fromkeys(("--student", "--student-name"), ("--student-model",)),
    **dict.fromkeys(("--teacher", "--teacher-name"), ("--teacher-model",)),
    **dict.fromkeys(("--data", "--dataset", "--dataset-name", "--train-file", "--train", "--input", "--file"), DATA),
    **dict.fromkeys(("--logits", "--cache-dir", "--cache-path", "--labels"), ("--cache", "--output")),
    **dict.fromkeys(("--output", "--output-dir", "--out", "--out-dir", "--output-path", "--save-dir", "-o"), PLACE),
    **dict.fromkeys(("--bs", "--batch", "--micro-batch-size", "--train-batch-size", "--per-device-train-batch-size"),
                    ("--batch-size",)),
    **dict.fromkeys(("--grad-accum", "--gradient-accumulation", "--accumulation-steps", "--accumulation"),
                    ("--gradient-accumulation-steps",)),
    **dict.fromkeys(("--gradient-checkpointing", "--activation-checkpointing", "--grad-checkpointing"),
                    ("--use-gradient-checkpointing",)),
    **dict.fromkeys(("--warmup", "--num-warmup-steps"), ("--warmup-steps",)),
    **dict.fromkeys(("--warmup-ratio", "--optim", "--optimizer", "--lr-scheduler-type", "--scheduler", "--adam-beta2"),
                    OTHERS),
    **dict.fromkeys(("--wd", "--decay"), ("--weight-decay",)),
    **dict.fromkeys(("--clip", "--grad-clip", "--gradient-clipping"), ("--max-grad-norm",)),
    **dict.fromkeys(("--resume", "--resume-from", "--checkpoint"), ("--resume-from-checkpoint",)),
    **dict.fromkeys(("--wandb", "--report-to"), ("--use-wandb",)),
    "--tensorboard": ("--use-tensorboard",),
    "--trackio": ("--use-trackio",),
    **dict.fromkeys(("--project", "--run-name", "--name"), ("--wandb-project", "--wandb-run-name")),
    **dict.fromkeys(("--temp", "--temperature", "--temperatures", "--kd-temperature"),
                    ("--temperature", "--temperatures")),
    **dict.fromkeys(("--kd-alpha", "--lambda", "--ce-weight", "--hard-loss-weight"), ("--alpha",)),
    **dict.fromkeys(("--kd-loss", "--kl", "--loss-type"), ("--divergence", "--distillation-type")),
    **dict.fromkeys(("--top-k", "--topk", "--k", "-k"), ("--head-size",)),
    **dict.fromkeys(("--draws", "--num-draws", "--tail-samples"), ("--tail-draws",)),
    **dict.fromkeys(("--tp", "--tensor-parallel", "--num-gpus"), ("--tensor-parallel-size", "--workers")),
    **dict.fromkeys(("--lora", "--lora-r", "--rank"), ("--lora-rank",)),
    **dict.fromkeys(("--qlora", "--load-4bit", "--4bit"), ("--load-in-4bit",)),
    **dict.fromkeys(("--eval-ratio", "--eval-split", "--val-split", "--validation-split"), ("--eval-fraction",)),
    **dict.fromkeys(("--eval-every", "--eval-interval"), ("--eval-steps",)),
    **dict.fromkeys(("--log-every", "--log-interval", "--log-steps"), ("--logging-steps",)),
    **dict.fromkeys(("--save-every", "--save-interval"), ("--save-steps",)),
    **dict.fromkeys(("--hub-model-id", "--push", "--upload"), ("--push-to-hub",)),
    **dict.fromkeys(("--url", "--api-base", "--server"), ("--base-url",)),
    **dict.fromkeys(("--force", "--replace"), ("--overwrite",)),
    **dict.fromkeys(("--threads", "--num-proc", "--jobs", "-j"), WORKERS),
    **dict.fromkeys(("--num-samples", "-n", "--count"), ("--num-examples", "--limit", "--test")),
    **dict.fromkeys(("--attention", "--attn", "--flash-attn"), ("--attn-implementation",)),
    **dict.fromkeys(("--compile",), ("--torch-compile",)),
}  # fmt: skip


def meant(typed: str, options: Collection[str]) -> list[str]:
    """Return which of a command's ``options`` may be meant by what was typed: known synonyms, else similar names."""
    synonyms = [option for option in SYNONYMS.get(typed.replace("_", "-"), ()) if option in options]
    return synonyms or difflib.get_close_matches(typed.replace("_", "-"), options, 3, 0.7)


def did_you_mean(options: Collection[str]) -> str:
    """Return the question that offers some options, with its colon; nothing if there are none."""
    return f": did you mean {' or '.join(options)}?" if options else ""


def error_lines(message: str, help_command: str) -> str:
    """Return what is printed of a mistake: what is wrong, how to fix it, where to read more; not all have all three.

    How to fix it is the last part that begins with one of ``VERBS``: earlier ones are advice within what is wrong, such
    as in a list of reasons. ``help_command`` is the command whose help says more, if the manual has no section on the
    mistake.
    """
    text = " ".join(message.split())
    plain = INSIDE.sub(lambda part: "-" * len(part[0]), text)
    cut = max((match.start() for match in FIX.finditer(plain)), default=len(text))
    lines = [f"error: {text[:cut]}", *(f"fix:   {part}" for part in [text[cut + 2 :]] if part)]
    anchor = section_of(text)
    lines += [f"see:   {MANUAL}#{anchor}"] if anchor else [f"see:   {help_command} --help"] if help_command else []
    return "\n".join(lines) + "\n"


def section_of(message: str) -> str | None:
    """Return the anchor of the manual's section on a message, None if there is none; of several the one named first."""
    parts = {anchor: words.split("…") for anchor, words in SECTIONS.items()}
    places = {
        anchor: message.find(words[0]) for anchor, words in parts.items() if all(word in message for word in words)
    }
    return min(places, key=lambda anchor: places[anchor], default=None)
