"""The HTTP gateway; never imports torch, training or model_export."""
