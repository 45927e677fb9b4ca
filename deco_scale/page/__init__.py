"""The demo page: pictures from a checkpoint, in a browser. Gradio is imported when a page is built."""
