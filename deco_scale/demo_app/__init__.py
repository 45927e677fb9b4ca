"""The web page of ``deco demo``: components, validation on the server, limits, and the generator behind it."""
