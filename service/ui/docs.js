// Swagger UI over /docs.json.
window.SwaggerUIBundle({ url: "/docs.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
