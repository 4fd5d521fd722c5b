"""Progress bars are silenced before any test module imports what draws them, as the command does for itself."""

import os

os.environ["TQDM_DISABLE"] = "1"
