"""Whether a teacher gives the labels of a cache that it is to finish."""

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.layout import GOLD_SCALE
from logitcask.cache.manifest import LabelSettings
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.precompute.sharding import Work
from logitcask.pipeline.teachers.served.teacher import ENGINE, SAME_WEIGHTS, distance
from logitcask.pipeline.teachers.teacher import Teacher, TokenizedExample

SAME_CONFIG = {"float32": 0.02}  # nats by which labels may differ on average, by the teacher's dtype
SAME_CONFIG_HALF = 0.1  # in 16 bits, on another kind of GPU too


def written_example(work: Work, cache: str) -> TokenizedExample | None:
    """Return the longest example of the first shard that a cache has, by whichever part; None if it has none."""
    first = min(CacheReader(cache, partial=True).committed, default=None)
    return None if first is None else work.batches(first)[0][0]


def require_same_labels(teacher: Teacher, example: TokenizedExample, label: LabelSettings, cache: str) -> None:
    """Raise LogitcaskError if a teacher's labels of an example are not those that a cache has.

    The identity in the manifest does not see a config that was edited, nor the weights of a server.
    """
    identity = teacher.facts.identity
    without_codes = label.model_copy(update={"exact": None})  # those are compared with the head
    (targets,) = teacher.label([example], without_codes).targets
    stored = CacheReader(cache, partial=True).example(example.index)
    difference = distance(targets.gold_logprobs, stored.targets.gold_logprobs, rounding=GOLD_SCALE / 2)
    served = identity.engine == ENGINE
    if difference > (SAME_WEIGHTS if served else SAME_CONFIG.get(identity.dtype, SAME_CONFIG_HALF)):
        whose, remedy = ("server's", "serve those") if served else ("teacher's", "give the teacher as it was")
        cause = "weights" if served else "settings, such as config.json's"
        raise LogitcaskError(
            f"{cache}: its labels differ from the {whose} by {difference:.3g} nats on average: it was made from other "
            f"{cause}: {remedy}, or choose another --output"
        )
