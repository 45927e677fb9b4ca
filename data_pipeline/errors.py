"""What goes wrong with data, by whose fault."""


class DataError(RuntimeError):
    """The data cannot be read or are not what the index says; names the object."""


class StoreError(DataError):
    """A store refused or failed; names bucket and key, never credentials."""
