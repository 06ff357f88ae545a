"""Low-rank adapters (LoRA, arXiv 2106.09685) on the language model, by peft.

They learn in place of the matrices that they stand beside. A checkpoint holds the sum of both: what
loads a model, generates or exports never meets an adapter.
"""

from torch import Tensor, nn

from model.minimind import MiniMind

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_adapters(model: MiniMind, rank: int, alpha: float) -> None:
    """Puts an adapter beside every matrix of every layer, in place; nothing else of `model` learns.

    The product of the two factors, scaled by alpha / rank, is zero at first.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and rarely needed

    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=MATRICES)
    inject_adapter_in_model(settings, model)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, under the names and with the values of a model without adapters."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = f"{name}.base_layer.weight"
            state[weight] = state[weight] + module.get_delta_weight("default").detach()
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }
