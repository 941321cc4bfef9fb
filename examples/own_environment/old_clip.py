from collections.abc import Sequence

from rewards import InputPath, PoolSettings, RewardRequest, setting


class OldClip:
    """Cosine of image and description, -1..1, by code that was written for transformers 4."""

    class Options(PoolSettings):
        path: InputPath = setting("assets/tiny/rewards/clip", "Folder of the CLIP model.")
        environment: list[str] = setting(["transformers<5"], "Lines of a pip requirements file.")

    def __init__(self, options: Options) -> None:
        import torch
        from transformers import CLIPFeatureExtractor, CLIPModel, PreTrainedTokenizerFast  # version 5 lacks the first

        self.model = CLIPModel.from_pretrained(options.path, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(options.path / "tokenizer.json"),
            model_max_length=self.model.config.text_config.max_position_embeddings,
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
        )
        side = self.model.config.vision_config.image_size
        self.pictures = CLIPFeatureExtractor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def score(self, requests: Sequence[RewardRequest]) -> list[float]:
        import torch

        texts = self.tokenizer([r.target for r in requests], padding=True, truncation=True, return_tensors="pt")
        pixels = self.pictures([r.image for r in requests], return_tensors="pt")
        with torch.inference_mode():
            found = self.model(texts.input_ids, pixels.pixel_values, texts.attention_mask)
        return (found.text_embeds * found.image_embeds).sum(-1).tolist()
