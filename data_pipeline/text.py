"""Numbers and names as text for people."""


def printable(text: object) -> str:
    """The text with ``?`` for each control character: names in data must not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def human_bytes(count: float) -> str:
    """Bytes with a binary prefix: 512 B, 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"


def duration(seconds: float) -> str:
    """The two largest units that are not zero, of days, hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    rest = round(seconds)
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def shape_text(shape: tuple[int, ...]) -> str:
    """A tensor's shape: 3x16x16, or ``scalar``."""
    return "x".join(map(str, shape)) or "scalar"
