"""What a sequence that leaves early owes the cache of keys and values (see ``bench.exits.generation``)."""

from __future__ import annotations

from typing import Literal

Policy = Literal["recompute", "propagate", "share_last", "share_first"]
POLICIES: dict[Policy, str] = {
    "recompute": "They stay empty until a later token needs them, and are then computed.",
    "propagate": "The state that left is projected to keys and values by every skipped step (CALM).",
    "share_last": "They take those of the last step that was computed with the same block.",
    "share_first": "They take those of the first step that was computed with the same block.",
}
