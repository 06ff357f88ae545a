"""The one training engine: it is handed a model, loaders and a config, and knows no stage."""
