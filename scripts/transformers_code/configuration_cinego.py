"""Cinego's config in the form that transformers reads: config.json of an exported directory."""

from transformers import AutoConfig, PreTrainedConfig

from model.config import CinegoConfig


class CinegoHubConfig(PreTrainedConfig):
    """What a checkpoint's .json says, whole, and the config of the vision tower.

    cinego: {"model": "Cinego", "model_config": …, and what training wrote beside it}.
    """

    model_type = "cinego"
    sub_configs = {"vision_config": AutoConfig}

    def __init__(self, cinego: dict | None = None, vision_config=None, **kwargs):
        self.cinego = cinego or {"model": "Cinego", "model_config": CinegoConfig().to_dict()}
        if isinstance(vision_config, dict):
            vision_config = AutoConfig.for_model(**vision_config)
        # transformers makes a config without arguments, too, to see what differs from it.
        self.vision_config = vision_config or AutoConfig.for_model("clip_vision_model")
        # The head is the embedding itself in our code; transformers has nothing to tie.
        super().__init__(**{**kwargs, "tie_word_embeddings": False})

    def model_config(self) -> CinegoConfig:
        return CinegoConfig.from_dict(self.cinego["model_config"])

    def _language_model(self, name: str):
        return self.cinego["model_config"]["language_model"][name]

    # Numbers that transformers' generation and caches ask a config for.
    vocab_size = property(lambda self: self._language_model("vocab_size"))
    hidden_size = property(lambda self: self._language_model("hidden_size"))
    num_hidden_layers = property(lambda self: self._language_model("num_hidden_layers"))
    num_attention_heads = property(lambda self: self._language_model("num_attention_heads"))
    num_key_value_heads = property(lambda self: self._language_model("num_key_value_heads"))
    max_position_embeddings = property(lambda self: self._language_model("max_position_embeddings"))
