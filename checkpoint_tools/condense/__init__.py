"""Condense: mixtures of experts into small dense layers (CD-MoE, arXiv:2412.00069), one step per file."""
