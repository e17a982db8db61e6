"""config.json files as people have them, in many spellings, and with a mistake now and then."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from megaqad.models.families import families

DENSE = (
    "llama",
    "mistral",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma3_text",
    "smollm3",
    "granite",
    "olmo2",
)
POSITIONS = 16
"""``max_position_embeddings``; half of them are the original training's."""
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu2")
SLIDING, FULL = "sliding_attention", "full_attention"
LEFT_OUT = object()
MISTAKES: list[dict[str, Any]] = [
    {"num_key_value_heads": 5},
    {"num_key_value_heads": 0},
    {"num_key_value_heads": None},
    {"head_dim": 15},
    {"head_dim": None},
    {"hidden_size": 33},
    {"intermediate_size": -8},
    {"sliding_window": 0, "use_sliding_window": True},
    {"sliding_window": None, "use_sliding_window": True},
    {"sliding_window_pattern": 0},
    {"no_rope_layers": [1]},
    {"layer_types": ["chunked_attention"] * 2, "num_hidden_layers": 2},
    {"layer_types": [SLIDING] * 3},
    {"rope_parameters": {"rope_type": "mrope", "rope_theta": 100.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0}},
    {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0],
            "long_factor": [1.0] * 7,
        }
    },
    {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
    {"rope_scaling": {"type": "su", "factor": 2.0}},
    {"rope_scaling": "linear"},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"partial_rotary_factor": 0.01},
    {"hidden_act": "relu"},
    {"hidden_activation": "mish"},
    {"is_causal": False},
    {"use_bidirectional_attention": True},
    {"final_logit_softcapping": 30.0},
    {"attn_logit_softcapping": 50.0},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"architectures": ["GPT2LMHeadModel"]},
    {"architectures": None, "model_type": None},
    {"model_type": "bloom"},
    {"rms_norm_eps": "small"},
    {"tie_word_embeddings": "yes"},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 10**9},
]


class Draft:
    """A config.json while it is drawn."""

    def __init__(self, draw: st.DrawFn, model_type: str) -> None:
        self.draw, self.model_type = draw, model_type
        self.content: dict[str, Any] = {}

    def maybe(self, key: str, *values: Any) -> None:
        """Give ``key`` one of the values, or leave it out."""
        value = self.one_of(LEFT_OUT, *values)
        if value is not LEFT_OUT:
            self.content[key] = value

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def layer_types(self) -> list[str]:
        return [self.one_of(SLIDING, FULL) for _ in range(self.content["num_hidden_layers"])]

    def sizes(self) -> None:
        heads, dim = self.one_of(1, 2, 3, 4), self.one_of(8, 16)
        self.content |= {
            "hidden_size": heads * dim,
            "num_attention_heads": heads,
            "num_key_value_heads": self.one_of(*(count for count in (1, 2, 3, 4) if heads % count == 0)),
            "intermediate_size": self.one_of(16, 24),
            "num_hidden_layers": self.one_of(1, 2),
            "vocab_size": 31,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": None,
        }
        self.dims = dim
        wide = self.one_of(LEFT_OUT, 12, 20)
        if self.model_type in ("qwen3", "gemma3_text", "ministral3", "ministral") and wide is LEFT_OUT:
            wide = dim  # the class has a default of its own, or none
        if wide is not LEFT_OUT:
            self.content["head_dim"] = self.dims = wide

    def form(self) -> dict[str, Any]:
        """One form of rotary embedding, without theta."""
        forms = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
        form = self.one_of(*(forms if self.model_type != "phi3" else ("default", "longrope")))
        settings: dict[str, Any] = {self.one_of("type", "rope_type"): form}
        if form in ("linear", "dynamic", "llama3", "yarn") or (form == "longrope" and self.one_of(True, False)):
            settings["factor"] = self.one_of(1.0, 4.0)
        if form in ("llama3", "yarn", "longrope"):
            settings["original_max_position_embeddings"] = POSITIONS // 2
        if form == "llama3":
            settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if form == "yarn":
            settings |= self.one_of({}, {"beta_fast": 8.0}, {"attention_factor": 1.25}, {"truncate": False})
        if form == "longrope":
            for key, base in (("short_factor", 1.0), ("long_factor", 3.0)):
                settings[key] = [base + index / 4 for index in range(self.dims // 2)]
        return settings

    def rotary(self) -> None:
        """In the old spelling, the new one, or both at once."""
        if self.model_type == "phi3":
            share = self.one_of(1.0, 0.75, 0.5)
            self.dims = int(self.dims * share)
            self.content["partial_rotary_factor"] = share
            self.maybe("original_max_position_embeddings", POSITIONS // 2)
        else:
            self.maybe("partial_rotary_factor", None, 1.0)
        self.maybe("rope_theta", 100.0, 5000.0, 10000)
        how = self.one_of("default", "old", "old", "null", "new", "new", "both")
        if how in ("old", "both"):
            self.content["rope_scaling"] = self.form()
        if how == "null":
            self.content["rope_scaling"] = None
        if how in ("new", "both") or self.model_type == "ministral3":
            new = self.form() | {"rope_theta": 300.0}
            if self.model_type == "ministral3":
                new |= {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": POSITIONS // 2}
                self.content.pop("rope_scaling", None)
            if self.model_type == "gemma3_text" and self.one_of(True, True, False):
                new = {FULL: new, SLIDING: self.form()}
            self.content["rope_parameters"] = new

    def own(self) -> None:
        """What only this family has."""
        windows: dict[str, Callable[[], None]] = {
            "mistral": lambda: self.maybe("sliding_window", 4, None),
            "ministral3": lambda: self.maybe("sliding_window", 4, None),
            "phi3": lambda: self.maybe("sliding_window", 4, None),
        }
        windows.get(self.model_type, lambda: None)()
        if self.model_type in ("ministral", "qwen2", "qwen3", "smollm3", "gemma3_text"):
            self.content["sliding_window"] = 4
            self.maybe("use_sliding_window", True, False)
            if self.content.get("use_sliding_window") or self.model_type in ("ministral", "gemma3_text"):
                self.maybe("layer_types", self.layer_types())
        if self.model_type in ("qwen2", "qwen3"):
            self.maybe("max_window_layers", 0, 1)
        if self.model_type == "smollm3":
            layers = self.content["num_hidden_layers"]
            self.maybe("no_rope_layers", None, [0] * layers, [1] * layers, [0, 1, 1])
            self.maybe("no_rope_layer_interval", 1, 2)
        if self.model_type == "gemma3_text":
            self.content["query_pre_attn_scalar"] = self.one_of(8, 16)
            self.maybe("sliding_window_pattern", 1, 2, 6)
            self.maybe("rope_local_base_freq", 50.0)
            self.maybe("use_bidirectional_attention", False)
            self.maybe("final_logit_softcapping", None)
        if self.model_type == "granite":
            self.maybe("embedding_multiplier", 12.0, 3)
            self.maybe("attention_multiplier", 0.25)
            self.maybe("residual_multiplier", 0.22)
            self.maybe("logits_scaling", 8.0)

    def common(self) -> None:
        self.maybe("hidden_activation" if self.model_type == "gemma3_text" else "hidden_act", *ACTIVATIONS)
        self.maybe("attention_bias", True, False)
        self.maybe("mlp_bias", True, False)
        self.maybe("tie_word_embeddings", True, False)
        self.maybe("rms_norm_eps", 1e-5, 1e-3)
        self.maybe("is_causal", True)
        right = families()[self.model_type].architecture
        self.maybe("architectures", [right], [], [right.replace("Llama", "LLaMA")])
        if self.content.get("architectures") != [right] or self.one_of(True, True, False):
            self.content["model_type"] = self.model_type


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A model type and the config.json of a model of it with one or two layers."""
    draft = Draft(draw, draw(st.sampled_from(DENSE)))
    draft.sizes()
    draft.rotary()
    draft.own()
    draft.common()
    mistake = draw(st.sampled_from([{}] * 2 * len(MISTAKES) + MISTAKES))
    content = draft.content | mistake
    return draft.model_type, {key: value for key, value in content.items() if value is not None or key not in NO_NULL}


NO_NULL = ("architectures", "model_type")
"""Null in a mistake stands for leaving them out."""
