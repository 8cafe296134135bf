import os

# Before anything is imported: the tests never reach for a hub, and two workers share two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("quiet", deadline=None)  # how long an example takes tells more of the machine's neighbours
settings.load_profile("quiet")
