"""The assistant as a Hugging Face Space: what runs there, and the folder that is uploaded. Never imports Ray."""
