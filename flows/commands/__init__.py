"""One module per family of commands; each has ``register(app)``, and ``flows.cli`` finds it by itself."""
