{{- /*
One Redis or Valkey with an append-only file: configuration, Service and StatefulSet.
Arguments: context, name ("redis" or "gcs-redis"), values (its own), secret and key (of its password).
*/ -}}
{{- define "tidegate.server" -}}
{{- $redis := .context.Values.redis }}
{{- $namespace := .context.Release.Namespace }}
{{- $component := dict "context" .context "component" .name }}
{{- $name := printf "%s-%s" (include "tidegate.fullname" .context) .name }}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- include "tidegate.labels" $component | nindent 4 }}
data:
  redis.conf: |
    {{- include "tidegate.serverConfig" . | nindent 4 }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- include "tidegate.labels" $component | nindent 4 }}
spec:
  selector:
    {{- include "tidegate.selector" $component | nindent 4 }}
  ports:
    - name: redis
      port: 6379
      targetPort: redis
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- include "tidegate.labels" $component | nindent 4 }}
spec:
  replicas: 1
  serviceName: {{ $name }}
  selector:
    matchLabels:
      {{- include "tidegate.selector" $component | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "tidegate.selector" $component | nindent 8 }}
      annotations:
        # The server reads its file at start only.
        tidegate.dev/config: {{ include "tidegate.serverConfig" . | sha256sum | trunc 16 | quote }}
    spec:
      automountServiceAccountToken: false
      enableServiceLinks: false
      {{- include "tidegate.pullSecrets" .context | nindent 6 }}
      securityContext:
        {{- include "tidegate.podSecurity" $redis.runAsUser | nindent 8 }}
      terminationGracePeriodSeconds: 60
      {{- with .values.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- include "tidegate.placement" .values | nindent 6 }}
      containers:
        - name: redis
          image: {{ printf "%s:%s" $redis.image.repository $redis.image.tag | quote }}
          imagePullPolicy: {{ $redis.image.pullPolicy }}
          command:
            {{- toYaml $redis.command | nindent 12 }}
          args:
            - /etc/redis/redis.conf
            - --requirepass
            - $(REDIS_PASSWORD)
          env:
            - name: REDIS_PASSWORD
              valueFrom:
                secretKeyRef:
                  name: {{ .secret }}
                  key: {{ .key }}
            - name: REDISCLI_AUTH  # for the probes
              value: $(REDIS_PASSWORD)
          ports:
            - name: redis
              containerPort: 6379
          # Reading a large file back takes a while, in which it answers LOADING.
          startupProbe:
            {{- include "tidegate.serverProbe" $redis.client | nindent 12 }}
            periodSeconds: 2
            timeoutSeconds: 5
            failureThreshold: 300
          livenessProbe:
            {{- include "tidegate.serverProbe" $redis.client | nindent 12 }}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            {{- include "tidegate.serverProbe" $redis.client | nindent 12 }}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 3
          resources:
            {{- toYaml .values.resources | nindent 12 }}
          securityContext:
            {{- include "tidegate.containerSecurity" . | nindent 12 }}
          workingDir: /data
          volumeMounts:
            - name: config
              mountPath: /etc/redis
              readOnly: true
            - name: data
              mountPath: /data
      volumes:
        - name: config
          configMap:
            name: {{ $name }}
        {{- if not .values.persistence.enabled }}
        - name: data
          emptyDir: {}
        {{- end }}
  {{- if .values.persistence.enabled }}
  persistentVolumeClaimRetentionPolicy:
    whenDeleted: {{ ternary "Retain" "Delete" .values.persistence.retain }}
    whenScaled: Retain
  volumeClaimTemplates:
    - apiVersion: v1
      kind: PersistentVolumeClaim
      metadata:
        name: data
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .values.persistence.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ .values.persistence.size }}
  {{- end }}
{{- end }}

{{- define "tidegate.serverConfig" -}}
port 6379
bind * -::*
dir /data
appendonly yes
appendfsync everysec
save ""
# A queue must not be evicted: full means that writes are refused.
maxmemory {{ .values.maxMemory }}
maxmemory-policy noeviction
{{- end }}

{{- define "tidegate.serverProbe" -}}
{{- if . -}}
exec:
  command: [sh, -c, '[ "$({{ . }} ping)" = PONG ]']
{{- else -}}
tcpSocket:
  port: redis
{{- end -}}
{{- end }}
