"""How large a checkpoint of Phi-4-mini's QLoRA is: at the default rank, and of the recipe `phi-instruct` as shipped.

    python -m tests.bench.checkpoint_size

Counted from configs alone, as `mmllm plan` does; nothing is fetched. Out: JSON, in GiB.
"""

import argparse
import json

from transformers import AutoConfig

from mmllm_core.config import LoraConfig
from mmllm_core.models.profile import load_profile
from tests.phi4_mini import PHI4_MINI
from train_jobs.memory_model import checkpoint_bytes
from train_jobs.model_shape import model_shape
from train_jobs.recipe import load_training_recipe


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    recipe = load_training_recipe("phi-instruct")
    profile = load_profile(recipe.profile)
    lm_config = AutoConfig.for_model("phi3", **PHI4_MINI)
    adapters = {"rank_16_gib": LoraConfig(rank=16), "recipe_gib": recipe.lora}
    found = {
        name: checkpoint_bytes(model_shape(profile, recipe.model_copy(update={"lora": lora}), lm_config)) / 2**30
        for name, lora in adapters.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
