"""What holds for all tests, before any of their modules is imported.

Progress bars are silenced, as the command does for itself; Ray's workers, by default the last to be given a processor,
are not kept waiting by the tests beside them.
"""

import os

os.environ["TQDM_DISABLE"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, Ray reads it so
