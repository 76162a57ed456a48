"""Keys of configurations: those of Mochi that are accepted without effect, and suggestions for
unknown keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping

ENGINE = "engine configuration: $"
"""Begins the message of an error in the configuration of an engine."""
MARGO = frozenset({
    "argobots", "diagnostics", "enable_abt_profiling", "enable_diagnostics", "enable_profiling",
    "handle_cache_size", "mercury", "monitoring", "output_dir", "plumber",
    "profile_sparkline_timeslice_msec", "profiling_sparkline_timeslice_msec", "progress_pool",
    "progress_spindown_msec", "progress_timeout_ub_msec", "progress_when_needed", "rpc_pool",
    "rpc_thread_count", "use_progress_thread", "version",
})  # fmt: skip
"""The documented keys of Margo's configuration."""
ABT_IO = frozenset({
    "internal_pool", "internal_pool_flag", "liburing_flags", "null_io_read", "null_io_write",
    "num_threads", "num_urings", "progress_pool", "trace_io",
})  # fmt: skip
"""The keys of ABT-IO, except ``backing_thread_count``, which has an effect here."""


PROTECTING = frozenset({"read_only_token", "read_only_token_file", "tls", "token", "token_file"})
"""Keys that protect an engine.  In a section without effect they are errors."""


def misplaced(config: Mapping[str, object]) -> str | None:
    """Return the path of a key that protects an engine but is in a section of *config* without
    effect; None if there is none."""
    for name in sorted(MARGO & config.keys()):
        section = config[name]
        if isinstance(section, dict) and (found := PROTECTING & section.keys()):
            return f"{name}.{min(found)}"
    return None


def unknown(key: object, known: Collection[str]) -> str:
    """Return the error message for a *key* that is not in *known*."""
    import difflib  # for errors only, and slow to import

    word = str(key).lower().replace("-", "_")
    meant = [other for other in sorted(known) if other != "insecure"]  # never suggested
    close = difflib.get_close_matches(word, meant, 1) or [
        other for other in meant if len(word) > 2 and other.startswith(word)
    ]
    if close:
        return f"unknown key, did you mean {close[0]}?"
    return f"unknown key, expected {', '.join(sorted(known)) or 'none'}"
