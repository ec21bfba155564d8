"""What a tensor's key in an adapter file says: which layer, and which of its tensors.

Owns the spellings of kohya, LyCORIS, diffusers old and new, and peft, and the names of the formats
that cannot be used. Knows no model.
"""

import re

FIELDS = {
    "down": r"[._]lora(?:_linear_layer)?[._]down(?:\.default)?\.weight"
    r"|\.lora_A(?:\.(?!bias)\w+)??(?:\.weight)?",
    "up": r"[._]lora(?:_linear_layer)?[._]up(?:\.default)?\.weight"
    r"|\.lora_B(?:\.(?!bias)\w+)??(?:\.weight)?",
    "up_bias": r"[._]lora(?:_linear_layer)?[._]up(?:\.default)?\.bias|\.lora_B(?:\.\w+)?\.bias",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora(?:_linear_layer)?)?\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(?:\.\w+)??(?:\.weight)?",
    "scalar": r"\.scalar",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "w_norm": r"\.w_norm",
    "b_norm": r"\.b_norm",
    "bias": r"(?:\.base_layer)?\.bias",
    **{
        name: rf"\.{name}(?:\.default)?"
        for name in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
}
"""Ends of keys, by what they are."""

_FIELDS = {field: re.compile(rf"(?P<layer>.+?)(?:{end})") for field, end in FIELDS.items()}

MERGE = "merge it into the model with the tool that made it, and give the merged model"
EMBEDDING = "give it as a word: model.words in a job, words in a served model"
FOREIGN = (
    (r"\.boft_", "a BOFT adapter", MERGE),
    (r"\.oft_", "an OFT (orthogonal) adapter", MERGE),
    (r"\.on_input$|ia3_l", "an (IA)3 adapter", MERGE),
    (r"\.[ab][12]\.weight$|\.bm\.weight$", "a GLoRA adapter", MERGE),
    (r"vera_lambda", "a VeRA adapter", MERGE),
    (r"reshape_weight$|set_weight$", "a change of a layer's size or whole weight", MERGE),
    (r"modules_to_save", "a whole layer that peft saved beside the adapter", MERGE),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "a textual inversion, no LoRA", EMBEDDING),
    (
        r"double_blocks|single_blocks|single_transformer_blocks|joint_blocks|^transformer\.|"
        r"lora_transformer_|lora_te3_",
        "of a transformer model (FLUX, SD3 or a kin), which is another family",
        "use it with the model that it was trained for",
    ),
    (
        r"lora_controlnet|control_model|controlnet",
        "of a ControlNet, which is no adapter",
        "leave it out",
    ),
    (r"scale_weight$|scaled_fp8|weight_scale$", "a scaled fp8 tensor", "save it in fp16 or bf16"),
    (
        r"^first_stage_model\.|^(?:model\.)?diffusion_model\..*(?<!lora_up)(?<!lora_down)\.weight$",
        "a weight of a whole model, no adapter's",
        "give the file as the model: model.uri",
    ),
)
"""Keys of what cannot be used: a pattern, what it is, and the way out."""

BUNDLED = re.compile(r"bundle_emb\.(?P<word>[^.]+)\..+")
"""Embeddings that OneTrainer puts beside a LoRA."""


def parse(key: str) -> tuple[str, str] | None:
    """(layer's name, field) of a key; None for a key of no known form."""
    for field, pattern in _FIELDS.items():
        if match := pattern.fullmatch(key):
            return match["layer"], field
    return None


def foreign(key: str) -> str:
    """What a key that cannot be used is, and the way out."""
    for pattern, what, way_out in FOREIGN:
        if re.search(pattern, key):
            return f"{key!r} is {what}; {way_out}"
    return (
        f"{key!r} is of no known adapter format; convert the file to kohya's, diffusers' or peft's"
    )
