"""Numbers and shapes as people write them."""


def format_shape(shape: tuple[int, ...]) -> str:
    """A shape as people write it."""
    return f"[{', '.join(map(str, shape))}]"


def format_count(count: int) -> str:
    """Digits in groups of three."""
    return f"{count:,}".replace(",", " ")


def large_count(count: int) -> str:
    """A large number in words."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return format_count(count)


def format_number(value: float) -> str:
    """Three digits; thousands without an exponent."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
