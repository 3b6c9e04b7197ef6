"""Reading and checking peft adapters, and holding many of them next to one base model."""
