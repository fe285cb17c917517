"""Networks, the flow, losses and the generation pipelines (paper, Sec. 3).

Shape legend, used in every file: B batch, L text tokens = K image tokens (77 in the paper),
C = 16 token channels, W width of a transformer, H heads, D head size, T channels of the text
states, R image size in pixels. Tokens are channel-last. t = 0 is text, t = 1 is image,
velocity = image - text. Images are in [0, 1].
"""
