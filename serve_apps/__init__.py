"""Ray Serve: CLIP, Whisper and Phi deployments behind an OpenAI-style API."""
