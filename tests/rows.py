"""States and contexts of single rows put together, as the decoder does it."""


def join_rows(parts):
    """The rows of ``parts`` one after the other, in the first of them."""
    first, *others = parts
    for other in others:
        first.join(other)
    return first
