"""The tasks that come with the suite: importing their modules registers them."""

from bench.data import (  # noqa: F401
    addition,
    audio,
    hub,
    instruction,
    kjv,
    memorisation,
    modular_chain,
    mqar,
    p_hop,
    pictures,
    recall,
    selective_copy,
    state_tracking,
    text_files,
    vowels,
)
