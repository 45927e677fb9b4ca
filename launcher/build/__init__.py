"""From a configuration to a trainer: model, data, engine, callbacks."""
