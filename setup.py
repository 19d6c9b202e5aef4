"""What pyproject.toml cannot say: the optional C extension, and the licence in a spelling that every setuptools takes. Everything else is
there.
"""

from glob import glob

from setuptools import Extension, setup

wire = Extension(
    "pyoverlay.fuse._wire",
    sorted(glob("src/pyoverlay/fuse/*.c")),
    depends=sorted(glob("src/pyoverlay/fuse/*.h")),
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
    extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    py_limited_api=True,
    optional=True,  # without a compiler the mount still works, slower
)
setup(
    ext_modules=[wire],
    package_dir={"": "src"},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    license="MIT",  # in pyproject.toml: as a string (PEP 639) 66 refuses it, as a table releases after February 2027 will
)
