"""Names of this package's operators. The kernel hub's builder puts its own module in this one's place (`make hub`).

There, several versions of a package can be loaded into one process, each with a namespace of its own.
"""


def add_op_namespace_prefix(name: str) -> str:
    return f"selsft::{name}"
