"""The shape of a model that is too large for tests and benches to load."""

PHI4_MINI = {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "pad_token_id": 199999,
    "bos_token_id": 199999,
    "eos_token_id": 199999,
}
"""As microsoft/Phi-4-mini-instruct says in its config.json."""
