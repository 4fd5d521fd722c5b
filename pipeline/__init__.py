"""The two stages of offline logit distillation, and the commands around them."""
