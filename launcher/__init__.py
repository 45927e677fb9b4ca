"""Entry points that wire the packages together; nothing imports them."""
