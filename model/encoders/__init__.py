"""What conditions and carries an image: text encoders and the autoencoder's latents."""
