"use strict";

SwaggerUIBundle({
  url: new URL("docs/openapi.json", location).href, // relative: a proxy may serve this under a prefix
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // no badge: it would send this server's address to someone else's
  tryItOutEnabled: false,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
});
