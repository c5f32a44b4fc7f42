"""fp16 and int8: how a variant is made of the fp32 file, and what it will compute."""
