"""Studies: what their files say, and how files, presets and overrides become one and its cells."""
