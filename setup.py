"""The part that is compiled where that can be done; all else is in pyproject.toml."""

import os
import sysconfig

from setuptools import Extension, setup

flags = [
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"),
    f"-ffile-prefix-map={os.getcwd()}=.",  # the same bytes wherever it is built
]
strict = bool(os.environ.get("WARABI_STRICT_BUILD"))  # by tools/setup test: no warning, no failure
# Python without the GIL has no stable ABI, and no direct access.
stable_abi = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "warabi.shm._fast_path",
            ["warabi/shm/_fast_path.c"],
            define_macros=[("_GNU_SOURCE", "1")],
            extra_compile_args=[*flags, "-Werror"] if strict else flags,
            py_limited_api=stable_abi,
            optional=not strict,  # without it there is no direct access
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable_abi else {},
)
