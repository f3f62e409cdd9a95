"""Fine-tuning of the quantized student against its teacher."""
