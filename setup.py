"""The one thing pyproject.toml cannot say: the optional C extension. Everything else is there."""

from setuptools import Extension, setup

wire = Extension(
    "pyoverlay.fuse._wire",
    [f"src/pyoverlay/fuse/{name}.c" for name in ("_wire", "_lane", "_direct", "_attributes", "_notify", "_calls", "_copy_up", "_make")],
    depends=[f"src/pyoverlay/fuse/{name}.h" for name in ("_protocol", "_lane", "_direct", "_notify", "_calls")],
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
    extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    py_limited_api=True,
    optional=True,  # without a compiler the mount still works, slower
)
setup(ext_modules=[wire], package_dir={"": "src"}, options={"bdist_wheel": {"py_limited_api": "cp311"}})
