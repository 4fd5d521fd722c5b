"""Which settings make a run the one that it is: a checkpoint is resumed only by a run of the same."""

from typing import Any

BASE_WEIGHTS = "base_weights"  # fingerprint of the weights that an adapter was trained on
# Settings that may change when a run is resumed: they affect what a step learns by rounding at most.
MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "extend", "extended_at"),
    *("save_steps", "save_total_limit", "logging_steps", "eval_steps"),
    *("eval_cache", "early_stopping_patience"),  # the examples that are held out are compared by their cache
    *("num_workers", "use_wandb", "wandb_project", "wandb_run_name", "use_tensorboard", "use_trackio", "cache"),
    *("local_copies", "local_copies_gb", "min_fidelity", "device"),
    *("chat_turns", "chat_template", "columns"),  # the data itself is compared by its tokens
    *("on_bad_record", "max_bad"),
    *("data_config", "data_split", "where"),  # as is what a cache's examples are chosen by
    *("use_gradient_checkpointing", "use_mixed_precision", "mixed_precision_dtype", "wandb_run_id"),
    "push_to_hub",
    *("merge_lora", "save_dtype", "attn_implementation", "torch_compile", "trust_remote_code", BASE_WEIGHTS),
}
LENGTH = ("max_steps", "epochs")  # may be greater if asked
# What a run did before there were options for it, and stored nothing about.
BEFORE = {"lora_dropout": 0.0, "lora_target_modules": "all-linear", "student_dtype": "float32", "load_in_4bit": False}
BEFORE |= {"load_best": False}
ARGUMENTS_MAY_CHANGE = ("hub_", "push_", "log_", "ddp_", "torch_", "disable_tqdm", "skip_memory_metrics", "debug")
BATCH = ("batch_size", "gradient_accumulation_steps", "world_size")  # only their product affects what a step learns


def learning_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine what a run learns at each step."""
    others = {name: value for name, value in {**BEFORE, **record}.items() if name not in {*MAY_CHANGE, *BATCH}}
    examples = 1
    for name in BATCH:
        examples *= int(record[name])
    arguments = {k: v for k, v in (record.get("training_args") or {}).items() if not k.startswith(ARGUMENTS_MAY_CHANGE)}
    return {**others, "training_args": arguments, " * ".join(BATCH): examples}
