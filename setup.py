"""The part that is compiled where that can be done; all else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "warabi.shm._fast_path",
            ["warabi/shm/_fast_path.c"],
            define_macros=[("_GNU_SOURCE", "1")],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
            optional=True,  # warabi/shm/fast_path.py does the same
        )
    ]
)
