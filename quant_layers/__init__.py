"""quant_layers"""
