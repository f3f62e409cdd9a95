"""The configuration of a run: settings, presets, TOML."""
